"""Mask R-CNN on BiFormer-Small, 1x on COCO: the published recipe (arXiv 2303.08810).

Command: foveate train detect/mask_rcnn_biformer_small_1x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 47.8 box AP, 43.2 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_single_scale.py", "../_base_/schedule_1x.py"]

task = "detect"
model = dict(
    head="mask_rcnn",
    backbone="biformer_small",
    pretrained=True,
    norm_eval=True,
    backbone_kwargs=dict(drop_path_rate=0.2),
)
optimizer = dict(no_decay=("norm",))
precision = "float16"
