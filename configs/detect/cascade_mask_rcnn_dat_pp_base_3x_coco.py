"""Cascade Mask R-CNN on DAT++-Base, 3x on COCO: the published recipe (arXiv 2309.01430).

The learning rate is that of 64 images a step: 1 on each of 64 GPUs.

Command: foveate train detect/cascade_mask_rcnn_dat_pp_base_3x_coco data.root=FOLDER
    by torchrun on 64 GPUs, as `foveate train --help` says
Expect: the paper states 54.5 box AP, 47.0 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_3x.py"]

task = "detect"
model = dict(
    head="cascade_mask_rcnn", backbone="dat_pp_base", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.8)
)
optimizer = dict(lr=0.0004, no_decay=("norm", "rpb"))
batch_size = 1
