r"""Deformable DETR DC5-R50 on one feature level, 50 epochs.

From: Deformable DETR (ICLR 2021); official README of Deformable-DETR.
Expected on COCO val2017: AP 41.5, APs 24.1, APm 45.3, APl 56.0.
Training: 16 GPUs x 2 images, 50 epochs. Trainable parameters: 33,844,193.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/deformable_detr_r50_single_scale_dc5_50ep.py --coco_path COCO \
        --output_dir outputs/deformable_detr_r50_single_scale_dc5_50ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "deformable_detr_r50_single_scale_50ep.py"

dilation = True
