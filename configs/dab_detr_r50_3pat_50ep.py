r"""DAB-DETR R50 with 3 patterns, 50 epochs.

From: DAB-DETR (ICLR 2022), Table 2.
Expected on COCO val2017: AP 42.6, AP50 63.2, AP75 45.6, APs 21.8, APm 46.2, APl 61.1.
Training: 8 GPUs x 2 images, 50 epochs. Trainable parameters: 43,449,885.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dab_detr_r50_3pat_50ep.py --coco_path COCO \
        --output_dir outputs/dab_detr_r50_3pat_50ep
"""

_base_ = "dab_detr_r50_50ep.py"

num_patterns = 3
