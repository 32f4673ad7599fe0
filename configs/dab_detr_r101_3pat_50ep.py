r"""DAB-DETR R101 with 3 patterns, 50 epochs.

From: DAB-DETR (ICLR 2022), Table 2.
Expected on COCO val2017: AP 44.1, AP50 64.7, AP75 47.2, APs 24.1, APm 48.2, APl 62.9.
Training: 8 GPUs x 2 images, 50 epochs. Trainable parameters: 62,389,789.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dab_detr_r101_3pat_50ep.py --coco_path COCO \
        --output_dir outputs/dab_detr_r101_3pat_50ep
"""

_base_ = "dab_detr_r50_3pat_50ep.py"

backbone = "resnet101"
