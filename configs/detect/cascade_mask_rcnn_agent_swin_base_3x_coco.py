"""Cascade Mask R-CNN on Agent-Swin-Base, 3x on COCO: the published recipe (arXiv 2312.08874).

Command: foveate train detect/cascade_mask_rcnn_agent_swin_base_3x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 52.6 box AP, 45.3 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_3x.py"]

task = "detect"
model = dict(
    head="cascade_mask_rcnn", backbone="agent_swin_base", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.4)
)
optimizer = dict(no_decay=("norm", "rpb", "an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias"))
