r"""DAB-DETR DC5-R101, 50 epochs.

From: DAB-DETR (ICLR 2022), Table 2.
Expected on COCO val2017: AP 45.8, AP50 65.9, AP75 49.3, APs 27.0, APm 49.8, APl 63.8.
Training: 16 GPUs x 1 image, 50 epochs. Trainable parameters: 62,389,021.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/dab_detr_dc5_r101_50ep.py --coco_path COCO \
        --output_dir outputs/dab_detr_dc5_r101_50ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "dab_detr_dc5_r50_50ep.py"

backbone = "resnet101"
