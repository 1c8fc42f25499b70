"""Mask2Former on DiNAT-Large, semantic segmentation of ADE20K: the published recipe (arXiv 2209.15001).

Command: foveate train segment/mask2former_dinat_large_160k_ade20k_semantic data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 58.1 mIoU (multi-scale); not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/mask2former_dinat_large.py", "../_base_/mask2former_ade20k.py"]

model = dict(task="semantic", recipe="ade20k_semantic")
data = dict(
    name="ade20k",
)
