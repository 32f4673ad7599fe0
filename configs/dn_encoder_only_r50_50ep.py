r"""DN-Deformable-DETR R50 with deformable attention in the encoder only, 50 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 4.
Expected on COCO val2017: AP 48.6, AP50 67.4, AP75 52.7, APs 31.0, APm 52.0, APl 63.7.
Training: 16 GPUs x 1 image, 50 epochs. Trainable parameters: 48,266,189.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/dn_encoder_only_r50_50ep.py --coco_path COCO \
        --output_dir outputs/dn_encoder_only_r50_50ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "dn_dab_detr_r50_50ep.py"

modelname = "dn_dab_deformable_detr_deformable_encoder_only"
num_patterns = 3
transformer_activation = "relu"
batch_size = 1
