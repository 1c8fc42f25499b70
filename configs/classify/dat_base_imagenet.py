"""DAT-Base on ImageNet-1k: the published recipe (arXiv 2201.00520).

Command: foveate train classify/dat_base_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the authors' log states 84.03 % top-1; not run by us.
Cost: not measured by us.
"""

_base_ = "dat_tiny_imagenet.py"

task = "classify"
model = dict(name="dat_base")
data = dict(crop_mode="squash")
# 4e-4 for 512 images.
optimizer = dict(lr=8e-4, clip_grad=1.0)
schedule = dict(warmup_epochs=50)
