"""DiNAT-Tiny on ImageNet-1k: the published recipe (arXiv 2209.15001), which is NAT's.

Command: foveate train classify/dinat_tiny_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=dinat_mini, dinat_small or dinat_base, each with its own drop path
Expect: the paper states 82.7 % top-1; Mini 81.8, Small 83.8, Base 84.4; not run by us.
Cost: not measured by us.
"""

_base_ = "nat_tiny_imagenet.py"

task = "classify"
model = dict(name="dinat_tiny")
