"""Mask2Former on DiNAT-Large, panoptic segmentation of ADE20K: the published recipe (arXiv 2209.15001).

Command: foveate train segment/mask2former_dinat_large_160k_ade20k_panoptic data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 49.4 PQ, 35.0 mask AP, 56.3 mIoU; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/mask2former_dinat_large.py", "../_base_/mask2former_ade20k.py"]

model = dict(task="panoptic", recipe="ade20k_panoptic")
data = dict(
    name="coco_panoptic",
    # Of Mask2Former's prepare_ade20k_pan_seg.py.
    train=dict(annotations="ade20k_panoptic_train.json", images="images/training", maps="ade20k_panoptic_train"),
    val=dict(annotations="ade20k_panoptic_val.json", images="images/validation", maps="ade20k_panoptic_val"),
)
