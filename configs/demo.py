"""A small DN-DAB-DETR for two CPU cores on the generated data set: `make demo`.

No pretrained weights: the backbone starts from random values, so its batch norms train and it gets a higher learning
rate. Pictures keep their 128 x 128 pixels; the backbone, a ResNet of 0.1 million parameters, ends at stride 16. Half of
the denoising labels are replaced (the published models replace a fifth): with so few steps the decoder learns classes
sooner when it cannot copy them. Two runs with two encoder layers were looked into: at a learning rate of 4e-4 and width
256 the encoder's output became nearly the same for every picture, at 1e-4 and width 128 it did not.
"""

modelname = "dn_dab_detr"
use_dn = True
label_noise_scale = 0.5

backbone = "timm:test_resnet"
backbone_weights = "none"
backbone_stages = 3
batch_norm_type = "BatchNorm2d"
hidden_dim = 192
nheads = 8
enc_layers = 1
dec_layers = 2
dim_feedforward = 384
num_queries = 20
transformer_activation = "relu"

epochs = 16
lr = 3.5e-4
lr_backbone = 1e-3
lr_drop = 13
batch_size = 8
data_aug_scales = [128]
data_aug_scales2_resize = [128]
data_aug_scales2_crop = [128, 128]
data_aug_max_size = 128
eval_scale = 128
num_workers = 1
print_freq = 100
seed = 42
