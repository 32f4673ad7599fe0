r"""DAB-DETR R50, 50 epochs.

From: DAB-DETR (ICLR 2022), Table 2.
Expected on COCO val2017: AP 42.2, AP50 63.1, AP75 44.7, APs 21.5, APm 45.7, APl 60.3.
Training: 8 GPUs x 2 images, 50 epochs. Trainable parameters: 43,449,117.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dab_detr_r50_50ep.py --coco_path COCO \
        --output_dir outputs/dab_detr_r50_50ep
"""

modelname = "dab_detr"
backbone = "resnet50"
num_queries = 300
lr = 1e-4
lr_backbone = 1e-5
weight_decay = 1e-4
batch_size = 2
epochs = 50
lr_drop = 40
