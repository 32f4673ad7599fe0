r"""Deformable DETR R50, 12 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 2.
Expected on COCO val2017: AP 37.2, AP50 55.5, AP75 40.5, APs 21.1, APm 40.7, APl 50.5.
Training: 16 GPUs x 2 images, 12 epochs. Trainable parameters: 39,847,265.
Assumed: the rate drops after 11 epochs, as in the other 12-epoch runs of that table.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/deformable_detr_r50_12ep.py --coco_path COCO \
        --output_dir outputs/deformable_detr_r50_12ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "deformable_detr_r50_50ep.py"

epochs = 12
lr_drop = 11
