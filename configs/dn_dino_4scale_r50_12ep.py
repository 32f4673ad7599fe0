r"""DINO 4-scale R50, 12 epochs.

From: DINO (ICLR 2023), Table 1.
Expected on COCO val2017: AP 49.0.
Training: 8 GPUs x 2 images, 12 epochs. Trainable parameters: 47,581,757.
The settings are DINO's, the model is the DINO style of DN-DETR's repository, which differs in details such as the
temperature of the position encoding: the AP is that of DINO. 100 is a budget of denoising queries. The box noise is
that of DINO's code; its paper prints 0.4.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dn_dino_4scale_r50_12ep.py --coco_path COCO \
        --output_dir outputs/dn_dino_4scale_r50_12ep
"""

_base_ = "dn_dino_deformable_r50_36ep.py"

num_queries = 900
scalar = 100
label_noise_scale = 0.5
box_noise_scale = 1.0
epochs = 12
lr_drop = 11
