"""DAT-Base fine-tuned at 384 pixels on ImageNet-1k: the published recipe (arXiv 2201.00520).

FILE are the weights of dat_base.

Command: foveate train classify/dat_base_384_imagenet data.root=FOLDER model.checkpoint=FILE
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the authors' log states 84.75 % top-1; not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/finetune_384.py"

task = "classify"
model = dict(name="dat_base_384")
data = dict(crop_mode="squash", crop_pct=0.8767)
# 2e-6 for 512 images.
optimizer = dict(name="adamw", lr=2e-6, weight_decay=1e-8, clip_grad=1.0)
