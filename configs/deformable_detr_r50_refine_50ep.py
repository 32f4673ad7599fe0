r"""Deformable DETR R50 with iterative bounding box refinement, 50 epochs.

From: Deformable DETR (ICLR 2021); official README of Deformable-DETR.
Expected on COCO val2017: AP 46.2, APs 28.3, APm 49.2, APl 61.5.
Training: 16 GPUs x 2 images, 50 epochs. Trainable parameters: 40,627,260.

    MASTER_ADDR=HOST0 NODE_RANK=0 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 python main.py \
        --config_file configs/deformable_detr_r50_refine_50ep.py --coco_path COCO \
        --output_dir outputs/deformable_detr_r50_refine_50ep

On the second host the same with NODE_RANK=1; HOST0 is the address of the first.
"""

_base_ = "deformable_detr_r50_50ep.py"

with_box_refine = True
