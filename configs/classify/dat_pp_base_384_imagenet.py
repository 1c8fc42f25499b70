"""DAT++-Base fine-tuned at 384 pixels on ImageNet-1k: the published recipe (arXiv 2309.01430).

FILE are the weights of dat_pp_base.

Command: foveate train classify/dat_pp_base_384_imagenet data.root=FOLDER model.checkpoint=FILE
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 85.9 % top-1; not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/finetune_384.py"

task = "classify"
model = dict(name="dat_pp_base_384")
data = dict(crop_mode="squash")
batch_size = 24
# 2e-5 for 512 images; 24 on each of 8 GPUs are 192.
optimizer = dict(name="adamw", lr=7.5e-6, weight_decay=1e-8, clip_grad=5.0)
