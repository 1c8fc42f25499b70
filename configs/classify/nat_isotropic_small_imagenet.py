"""Isotropic NAT-Small on ImageNet-1k: the published recipe (arXiv 2209.15001), which is NAT's.

Command: foveate train classify/nat_isotropic_small_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=dinat_isotropic_small or vitrpb_small
Expect: the paper states 80.0 % top-1; isotropic DiNAT 80.8, with global attention 81.2; not run by us.
Cost: not measured by us.
"""

_base_ = "nat_tiny_imagenet.py"

task = "classify"
model = dict(name="nat_isotropic_small")
