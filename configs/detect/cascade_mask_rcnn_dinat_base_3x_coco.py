"""Cascade Mask R-CNN on DiNAT-Base, 3x on COCO: the published recipe (arXiv 2209.15001).

Command: foveate train detect/cascade_mask_rcnn_dinat_base_3x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 53.4 box AP, 46.2 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_3x.py"]

task = "detect"
model = dict(head="cascade_mask_rcnn", backbone="dinat_base", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.6))
optimizer = dict(lr=7.5e-05, no_decay=("norm", "rpb"))
precision = "float16"
