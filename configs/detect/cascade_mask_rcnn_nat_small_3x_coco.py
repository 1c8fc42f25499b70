"""Cascade Mask R-CNN on NAT-Small, 3x on COCO: the published recipe (arXiv 2204.07143).

Command: foveate train detect/cascade_mask_rcnn_nat_small_3x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 52.0 box AP, 44.9 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_3x.py"]

task = "detect"
model = dict(head="cascade_mask_rcnn", backbone="nat_small", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.3))
optimizer = dict(no_decay=("norm", "rpb"))
precision = "float16"
