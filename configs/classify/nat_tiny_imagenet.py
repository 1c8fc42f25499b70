"""NAT-Tiny on ImageNet-1k: the published recipe (arXiv 2204.07143).

Left out: 10 epochs more at the last rate. Tables of position bias were decayed by the authors, and are not here.

Command: foveate train classify/nat_tiny_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=nat_mini, nat_small or nat_base, each with its own drop path
Expect: the paper states 83.2 % top-1; Mini 81.8, Small 83.7, Base 84.3; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/imagenet.py", "../_base_/schedule_300ep.py"]

task = "classify"
model = dict(name="nat_tiny")
data = dict(augment=dict(interpolation="random"))
optimizer = dict(clip_grad=5.0)
