r"""DN-DETR R101, 50 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 1.
Expected on COCO val2017: AP 45.2, AP50 65.5, AP75 48.3, APs 24.1, APm 49.1, APl 65.1.
Training: 8 GPUs x 2 images, 50 epochs. Trainable parameters: 62,412,481.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dn_dab_detr_r101_50ep.py --coco_path COCO \
        --output_dir outputs/dn_dab_detr_r101_50ep
"""

_base_ = "dn_dab_detr_r50_50ep.py"

backbone = "resnet101"
