"""Mask R-CNN on DiNAT_s-Small, 3x on COCO: the published recipe (arXiv 2209.15001).

Command: foveate train detect/mask_rcnn_dinat_s_small_3x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 48.6 box AP, 43.5 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_3x.py"]

task = "detect"
model = dict(head="mask_rcnn", backbone="dinat_s_small", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.35))
optimizer = dict(no_decay=("norm", "rpb"))
precision = "float16"
