r"""DN-Deformable-DETR R101 with deformable attention in the encoder only, 12 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 2.
Expected on COCO val2017: AP 44.1, AP50 62.8, AP75 47.9, APs 26.0, APm 47.8, APl 61.3.
Training: 16 GPUs x 1 image, 12 epochs. Trainable parameters: 67,206,093.
Assumed: 10 denoising groups, as for R50.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/dn_encoder_only_r101_12ep.py --coco_path COCO \
        --output_dir outputs/dn_encoder_only_r101_12ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "dn_encoder_only_r50_12ep.py"

backbone = "resnet101"
