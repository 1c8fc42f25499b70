"""Mask R-CNN on Agent-Swin-Tiny, 3x on COCO: the published recipe (arXiv 2312.08874).

Command: foveate train detect/mask_rcnn_agent_swin_tiny_3x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 47.3 box AP, 42.7 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_3x.py"]

task = "detect"
model = dict(head="mask_rcnn", backbone="agent_swin_tiny", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.1))
optimizer = dict(no_decay=("norm", "rpb", "an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias"))
