r"""DN-Deformable-DETR R50++, 50 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 4.
Expected on COCO val2017: AP 49.5, AP50 67.6, AP75 53.8, APs 31.3, APm 52.6, APl 65.4.
Training: 8 GPUs x 2 images, 50 epochs. Trainable parameters: 47,206,754.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dn_deformable_r50_50ep.py --coco_path COCO \
        --output_dir outputs/dn_deformable_r50_50ep
"""

_base_ = "dn_dab_detr_r50_50ep.py"

modelname = "dn_dab_deformable_detr"
transformer_activation = "relu"
