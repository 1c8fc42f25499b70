"""UperNet on NAT-Mini, 160k on ADE20K: the published recipe (arXiv 2204.07143).

Command: foveate train segment/upernet_nat_mini_160k_ade20k data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 45.1 mIoU, 46.4 mIoU (multi-scale); not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/ade20k.py", "../_base_/schedule_160k.py"]

task = "segment"
model = dict(head="upernet", backbone="nat_mini", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.2))
optimizer = dict(no_decay=("norm", "rpb"))
precision = "float16"
