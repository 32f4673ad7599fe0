r"""DN-Deformable-DETR R50 with deformable attention in the encoder only, 10 denoising groups, 12 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 2.
Expected on COCO val2017: AP 43.4, AP50 61.9, AP75 47.2, APs 24.8, APm 46.8, APl 59.4.
Training: 16 GPUs x 1 image, 12 epochs. Trainable parameters: 48,266,189.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/dn_encoder_only_r50_12ep.py --coco_path COCO \
        --output_dir outputs/dn_encoder_only_r50_12ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "dn_encoder_only_r50_50ep.py"

scalar = 10
epochs = 12
lr_drop = 11
