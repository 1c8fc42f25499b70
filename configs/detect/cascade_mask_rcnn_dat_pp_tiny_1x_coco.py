"""Cascade Mask R-CNN on DAT++-Tiny, 1x on COCO: the published recipe (arXiv 2309.01430).

The learning rate is that of 64 images a step: 2 on each of 32 GPUs.

Command: foveate train detect/cascade_mask_rcnn_dat_pp_tiny_1x_coco data.root=FOLDER
    by torchrun on 32 GPUs, as `foveate train --help` says
Expect: the paper states 52.2 box AP, 45.0 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_1x.py"]

task = "detect"
model = dict(
    head="cascade_mask_rcnn", backbone="dat_pp_tiny", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.0)
)
optimizer = dict(lr=0.0004, no_decay=("norm", "rpb"))
precision = "float16"
