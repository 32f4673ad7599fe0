r"""DN-DETR R50, 50 epochs.

From: DN-DETR (CVPR 2022; extended version, arXiv 2203.01305), Table 1.
Expected on COCO val2017: AP 44.1, AP50 64.4, AP75 46.7, APs 22.9, APm 48.0, APl 63.4; 44.4 in the official README,
after the paper.
Training: 8 GPUs x 2 images, 50 epochs. Trainable parameters: 43,472,577.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dn_dab_detr_r50_50ep.py --coco_path COCO \
        --output_dir outputs/dn_dab_detr_r50_50ep
"""

modelname = "dn_dab_detr"
use_dn = True
scalar = 5
label_noise_scale = 0.2
box_noise_scale = 0.4
backbone = "resnet50"
num_queries = 300
lr = 1e-4
lr_backbone = 1e-5
weight_decay = 1e-4
batch_size = 2
epochs = 50
lr_drop = 40
