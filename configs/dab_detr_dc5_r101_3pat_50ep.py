r"""DAB-DETR DC5-R101 with 3 patterns, 50 epochs.

From: DAB-DETR (ICLR 2022), Table 2.
Expected on COCO val2017: AP 46.6, AP50 67.0, AP75 50.2, APs 28.1, APm 50.5, APl 64.1.
Training: 16 GPUs x 1 image, 50 epochs. Trainable parameters: 62,389,789.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/dab_detr_dc5_r101_3pat_50ep.py --coco_path COCO \
        --output_dir outputs/dab_detr_dc5_r101_3pat_50ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "dab_detr_dc5_r50_3pat_50ep.py"

backbone = "resnet101"
