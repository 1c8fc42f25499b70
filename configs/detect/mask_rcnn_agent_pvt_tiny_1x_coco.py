"""Mask R-CNN on Agent-PVT-Tiny, 1x on COCO: the published recipe (arXiv 2312.08874).

Command: foveate train detect/mask_rcnn_agent_pvt_tiny_1x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 41.4 box AP, 38.7 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_single_scale.py", "../_base_/schedule_1x.py"]

task = "detect"
model = dict(head="mask_rcnn", backbone="agent_pvt_tiny", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.1))
optimizer = dict(lr=0.0002, weight_decay=0.0001, no_decay=())
