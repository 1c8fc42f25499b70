"""DiNAT_s-Tiny on ImageNet-1k: the published recipe (arXiv 2209.15001), which is NAT's.

Command: foveate train classify/dinat_s_tiny_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=dinat_s_small or dinat_s_base, each with its own drop path
Expect: the paper states 81.8 % top-1; Small 83.5, Base 83.8; not run by us.
Cost: not measured by us.
"""

_base_ = "nat_tiny_imagenet.py"

task = "classify"
model = dict(name="dinat_s_tiny")
