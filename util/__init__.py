"""What all floors share: options, boxes, checkpoints, distributed work, logs and plots."""
