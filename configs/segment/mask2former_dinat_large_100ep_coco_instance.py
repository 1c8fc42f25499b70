"""Mask2Former on DiNAT-Large, instance segmentation of COCO: the published recipe (arXiv 2209.15001).

Command: foveate train segment/mask2former_dinat_large_100ep_coco_instance data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 50.8 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/mask2former_dinat_large.py", "../_base_/mask2former_coco.py"]

model = dict(task="instance", recipe="coco_instance")
data = dict(
    name="coco",
    train=dict(annotations="annotations/instances_train2017.json", images="train2017"),
    val=dict(annotations="annotations/instances_val2017.json", images="val2017"),
    num_classes=80,
)
