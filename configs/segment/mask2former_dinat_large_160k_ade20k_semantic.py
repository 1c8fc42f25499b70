"""Mask2Former on DiNAT-Large, semantic segmentation of ADE20K: the published recipe (arXiv 2209.15001).

Command: foveate train segment/mask2former_dinat_large_160k_ade20k_semantic data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 58.1 mIoU (multi-scale); not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/mask2former_dinat_large.py"

model = dict(task="semantic", recipe="ade20k_semantic")
data = dict(
    name="ade20k",
    num_classes=150,
    short=640,
    long=2560,
    augment=dict(shorts=tuple(range(320, 1281, 64)), long=2560, crop=640, flip=0.5, distortion=True),
)
iterations = 160_000
val_interval = 4
schedule = dict(name="poly", power=0.9, final_factor=0.0)
