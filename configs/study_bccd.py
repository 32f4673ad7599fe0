"""The demonstration's detector on 292 pictures of blood cells (BCCD), for the comparison in docs/denoising_study.md.

The pictures are 640 x 480 and are read at about 256 x 192; one holds up to 30 cells.
"""

_base_ = "demo.py"

label_mapping = "contiguous"
num_queries = 50
epochs = 30
lr_drop = 24
batch_size = 4
data_aug_scales = [176, 192, 208]
data_aug_scales2_resize = [176, 192, 208]
data_aug_scales2_crop = [144, 192]
data_aug_max_size = 288
eval_scale = 192
print_freq = 73
