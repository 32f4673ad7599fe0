r"""DAB-DETR DC5-R50 with 3 patterns, 12 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 2.
Expected on COCO val2017: AP 38.0, AP50 60.3, AP75 39.8, APs 19.2, APm 40.9, APl 55.4.
Training: 16 GPUs x 1 image, 12 epochs. Trainable parameters: 43,449,885.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/dab_detr_dc5_r50_3pat_12ep.py --coco_path COCO \
        --output_dir outputs/dab_detr_dc5_r50_3pat_12ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "dab_detr_dc5_r50_3pat_50ep.py"

epochs = 12
lr_drop = 11
