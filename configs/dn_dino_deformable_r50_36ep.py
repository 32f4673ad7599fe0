r"""DINO-style DN-DETR R50, 36 epochs.

From: pull request 45 of the official DN-DETR repository.
Expected on COCO val2017: AP 50.8 to 51.0, AP50 68.9, AP75 55.6, APs 35.0, APm 54.2, APl 65.0 (the five others of the
run with 51.0).
Training: 8 GPUs x 2 images, 36 epochs. Trainable parameters: 47,428,157.
Assumed: 300 queries, 5 denoising groups and their noise, the defaults of that repository; the rate drops after 30
epochs, as in the 36-epoch runs of DINO (ICLR 2023). The pull request names none of them.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dn_dino_deformable_r50_36ep.py --coco_path COCO \
        --output_dir outputs/dn_dino_deformable_r50_36ep
"""

_base_ = "dn_dab_detr_r50_50ep.py"

modelname = "dn_dab_dino_deformable_detr"
transformer_activation = "relu"
two_stage = True
use_mqs = True
use_lft = True
contrastive = True
epochs = 36
lr_drop = 30
