"""Semantic FPN on Agent-PVT-Tiny, 40k on ADE20K: the published recipe (arXiv 2312.08874).

Command: foveate train segment/semantic_fpn_agent_pvt_tiny_40k_ade20k data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 40.18 mIoU, 51.76 mAcc; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/ade20k.py", "../_base_/schedule_40k.py"]

task = "segment"
model = dict(head="semantic_fpn", backbone="agent_pvt_tiny", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.1))
optimizer = dict(no_decay=())
batch_size = 2
