"""RetinaNet on Agent-PVT-Small, 1x on COCO: the published recipe (arXiv 2312.08874).

Command: foveate train detect/retinanet_agent_pvt_small_1x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 44.1 box AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_single_scale.py", "../_base_/schedule_1x.py"]

task = "detect"
model = dict(head="retinanet", backbone="agent_pvt_small", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.1))
optimizer = dict(weight_decay=0.0001, no_decay=())
