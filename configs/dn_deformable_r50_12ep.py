r"""DN-Deformable-DETR R50++, 12 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 2.
Expected on COCO val2017: AP 46.0, AP50 63.8, AP75 49.9, APs 27.7, APm 49.1, APl 62.3.
Training: 8 GPUs x 2 images, 12 epochs. Trainable parameters: 47,206,754.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dn_deformable_r50_12ep.py --coco_path COCO \
        --output_dir outputs/dn_deformable_r50_12ep
"""

_base_ = "dn_deformable_r50_50ep.py"

epochs = 12
lr_drop = 11
