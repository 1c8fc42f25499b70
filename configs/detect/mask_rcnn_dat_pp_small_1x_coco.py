"""Mask R-CNN on DAT++-Small, 1x on COCO: the published recipe (arXiv 2309.01430).

The learning rate is that of 64 images a step: 2 on each of 32 GPUs.

Command: foveate train detect/mask_rcnn_dat_pp_small_1x_coco data.root=FOLDER
    by torchrun on 32 GPUs, as `foveate train --help` says
Expect: the paper states 49.8 box AP, 44.5 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_1x.py"]

task = "detect"
model = dict(
    head="mask_rcnn",
    backbone="dat_pp_small",
    pretrained=True,
    backbone_kwargs=dict(drop_path_rate=0.1),
    kwargs=dict(extra_convs="on_input"),
)
optimizer = dict(lr=0.0004, no_decay=("norm", "rpb"))
precision = "float16"
