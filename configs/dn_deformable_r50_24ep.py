r"""DN-Deformable-DETR R50++, 24 epochs.

From: official README of DN-DETR, model zoo.
Expected on COCO val2017: AP 48.4.
Training: 8 GPUs x 2 images, 24 epochs. Trainable parameters: 47,206,754.
Assumed: the rate drops after 20 epochs, as in the 24-epoch runs of DINO (ICLR 2023); the README does not say.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dn_deformable_r50_24ep.py --coco_path COCO \
        --output_dir outputs/dn_deformable_r50_24ep
"""

_base_ = "dn_deformable_r50_50ep.py"

epochs = 24
lr_drop = 20
