r"""DAB-DETR R101, 50 epochs.

From: DAB-DETR (ICLR 2022), Table 2.
Expected on COCO val2017: AP 43.5, AP50 63.9, AP75 46.6, APs 23.6, APm 47.3, APl 61.5.
Training: 8 GPUs x 2 images, 50 epochs. Trainable parameters: 62,389,021.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dab_detr_r101_50ep.py --coco_path COCO \
        --output_dir outputs/dab_detr_r101_50ep
"""

_base_ = "dab_detr_r50_50ep.py"

backbone = "resnet101"
