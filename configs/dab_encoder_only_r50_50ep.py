r"""DAB-Deformable-DETR R50 with deformable attention in the encoder only, 50 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 4.
Expected on COCO val2017: AP 46.9, AP50 66.0, AP75 50.8, APs 30.1, APm 50.4, APl 62.5.
Training: 16 GPUs x 1 image, 50 epochs. Trainable parameters: 48,266,189.
The model of DN-DETR without denoising: it carries label embeddings, of which only the last row is used.
Assumed: 3 patterns, as with denoising.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/dab_encoder_only_r50_50ep.py --coco_path COCO \
        --output_dir outputs/dab_encoder_only_r50_50ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "dn_encoder_only_r50_50ep.py"

modelname = "dn_dab_deformable_detr_deformable_encoder_only"
use_dn = False
