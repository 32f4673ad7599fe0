r"""DAB-Deformable-DETR R50, second version, 50 epochs.

From: official README of DAB-DETR, model zoo.
Expected on COCO val2017: AP 48.7.
Training: 8 GPUs x 2 images, 50 epochs. Trainable parameters: 47,183,594.
Assumed: batch size, rates and schedule of DAB-DETR R50, which are those of its command with denoising.

    GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py \
        --config_file configs/dab_deformable_r50_50ep.py --coco_path COCO \
        --output_dir outputs/dab_deformable_r50_50ep
"""

_base_ = "dab_detr_r50_50ep.py"

modelname = "dab_deformable_detr"
transformer_activation = "relu"
