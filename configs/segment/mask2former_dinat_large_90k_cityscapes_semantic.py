"""Mask2Former on DiNAT-Large, semantic segmentation of Cityscapes: the published recipe (arXiv 2209.15001).

Command: foveate train segment/mask2former_dinat_large_90k_cityscapes_semantic data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 84.5 mIoU (multi-scale); not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/mask2former_dinat_large.py", "../_base_/mask2former_cityscapes.py"]

model = dict(task="semantic", recipe="cityscapes_semantic")
data = dict(
    name="cityscapes",
)
