"""Isotropic NAT-Base on ImageNet-1k: the published recipe (arXiv 2209.15001).

Command: foveate train classify/nat_isotropic_base_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=dinat_isotropic_base or vitrpb_base
Expect: the paper states 81.6 % top-1; isotropic DiNAT 82.1, with global attention 82.5; not run by us.
Cost: not measured by us.
"""

_base_ = "nat_tiny_imagenet.py"

task = "classify"
model = dict(name="nat_isotropic_base")
schedule = dict(warmup_epochs=50)
ema = 2e-4
