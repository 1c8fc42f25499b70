"""Mask2Former on DiNAT-Large, semantic segmentation of Cityscapes: the published recipe (arXiv 2209.15001).

Command: foveate train segment/mask2former_dinat_large_90k_cityscapes_semantic data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 84.5 mIoU (multi-scale); not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/mask2former_dinat_large.py"

model = dict(task="semantic", recipe="cityscapes_semantic")
data = dict(
    name="cityscapes",
    num_classes=19,
    short=1024,
    long=2048,
    augment=dict(shorts=tuple(range(512, 2049, 102)), long=4096, crop=(512, 1024), flip=0.5, distortion=True),
)
iterations = 90_000
val_interval = 25
schedule = dict(name="poly", power=0.9, final_factor=0.0)
