r"""Deformable DETR R50, 50 epochs.

From: Deformable DETR (ICLR 2021); official README of Deformable-DETR.
Expected on COCO val2017: AP 44.5, APs 27.1, APm 47.6, APl 59.6.
Training: 16 GPUs x 2 images, 50 epochs. Trainable parameters: 39,847,265.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/deformable_detr_r50_50ep.py --coco_path COCO \
        --output_dir outputs/deformable_detr_r50_50ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

modelname = "deformable_detr"
backbone = "resnet50"
num_queries = 300
num_feature_levels = 4
dim_feedforward = 1024
dropout = 0.1
lr = 2e-4
lr_backbone = 2e-5
weight_decay = 1e-4
batch_size = 2
epochs = 50
lr_drop = 40
