#!/usr/bin/env bash
# Train Deformable DETR R50 on one feature level: COCO in $COCO_PATH [data/coco], results in outputs/.
# Further options of main.py can follow, and win over these.
set -euo pipefail

exec python -u main.py -m deformable_detr \
    --coco_path "${COCO_PATH:-data/coco}" \
    --output_dir outputs/r50_deformable_detr_single_scale \
    --num_feature_levels 1 \
    "$@"
