"""Mask2Former on DiNAT-Large, panoptic segmentation of Cityscapes: the published recipe (arXiv 2209.15001).

Command: foveate train segment/mask2former_dinat_large_90k_cityscapes_panoptic data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 67.2 PQ, 44.5 mask AP, 83.4 mIoU; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/mask2former_dinat_large.py", "../_base_/mask2former_cityscapes.py"]

model = dict(task="panoptic", recipe="cityscapes_panoptic")
data = dict(
    name="coco_panoptic",
    # Of cityscapesscripts' createPanopticImgs.py, with train ids.
    train=dict(annotations="gtFine/cityscapes_panoptic_train_trainId.json", images="leftImg8bit/train"),
    val=dict(annotations="gtFine/cityscapes_panoptic_val_trainId.json", images="leftImg8bit/val"),
)
