r"""DN-DETR DC5-R101, 50 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 1.
Expected on COCO val2017: AP 47.3, AP50 67.5, AP75 50.8, APs 28.6, APm 51.5, APl 65.0.
Training: 16 GPUs x 1 image, 50 epochs. Trainable parameters: 62,412,481.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/dn_dab_detr_dc5_r101_50ep.py --coco_path COCO \
        --output_dir outputs/dn_dab_detr_dc5_r101_50ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "dn_dab_detr_r50_50ep.py"

backbone = "resnet101"
dilation = True
batch_size = 1
