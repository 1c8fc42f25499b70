"""RetinaNet on Agent-PVT-Medium, 1x on COCO: the published recipe (arXiv 2312.08874).

Command: foveate train detect/retinanet_agent_pvt_medium_1x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 45.8 box AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_single_scale.py", "../_base_/schedule_1x.py"]

task = "detect"
model = dict(head="retinanet", backbone="agent_pvt_medium", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.2))
optimizer = dict(weight_decay=0.0001, no_decay=())
