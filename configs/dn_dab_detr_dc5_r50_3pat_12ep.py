r"""DN-DETR DC5-R50 with 3 patterns, 12 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 2.
Expected on COCO val2017: AP 41.7, AP50 61.4, AP75 44.1, APs 21.2, APm 45.0, APl 60.2.
Training: 16 GPUs x 1 image, 12 epochs. Trainable parameters: 43,473,345.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/dn_dab_detr_dc5_r50_3pat_12ep.py --coco_path COCO \
        --output_dir outputs/dn_dab_detr_dc5_r50_3pat_12ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "dn_dab_detr_r50_50ep.py"

dilation = True
num_patterns = 3
batch_size = 1
epochs = 12
lr_drop = 11
