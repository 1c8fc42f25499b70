"""UperNet on Agent-Swin-Base, 160k on ADE20K: the published recipe (arXiv 2312.08874).

Command: foveate train segment/upernet_agent_swin_base_160k_ade20k data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 48.73 mIoU, 60.01 mAcc; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/ade20k.py", "../_base_/schedule_160k.py"]

task = "segment"
model = dict(head="upernet", backbone="agent_swin_base", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.5))
optimizer = dict(no_decay=("norm", "rpb", "an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias"))
