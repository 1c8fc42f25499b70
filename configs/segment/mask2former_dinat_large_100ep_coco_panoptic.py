"""Mask2Former on DiNAT-Large, panoptic segmentation of COCO: the published recipe (arXiv 2209.15001).

Command: foveate train segment/mask2former_dinat_large_100ep_coco_panoptic data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 58.5 PQ, 49.2 mask AP, 68.3 mIoU; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/mask2former_dinat_large.py", "../_base_/mask2former_coco.py"]

model = dict(task="panoptic", recipe="coco_panoptic")
data = dict(
    name="coco_panoptic",
    train=dict(annotations="annotations/panoptic_train2017.json", images="train2017"),
    val=dict(annotations="annotations/panoptic_val2017.json", images="val2017"),
    num_classes=133,
)
