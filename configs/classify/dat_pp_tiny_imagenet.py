"""DAT++-Tiny on ImageNet-1k: the published recipe (arXiv 2309.01430).

Command: foveate train classify/dat_pp_tiny_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=dat_pp_small, or dat_pp_base with batch_size=64 on 16 GPUs, each with its own drop path
Expect: the paper states 83.9 % top-1; Small 84.6, Base 84.9; not run by us.
Cost: not measured by us.
"""

_base_ = "dat_tiny_imagenet.py"

task = "classify"
model = dict(name="dat_pp_tiny")
data = dict(crop_mode="squash")
