"""The demonstration's detector in eight epochs, for the comparison in docs/denoising_study.md."""

_base_ = "demo.py"

epochs = 8
lr_drop = 7
