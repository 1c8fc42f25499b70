"""UperNet on DiNAT-Tiny, 160k on ADE20K: the published recipe (arXiv 2209.15001).

Command: foveate train segment/upernet_dinat_tiny_160k_ade20k data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 47.8 mIoU, 48.8 mIoU (multi-scale); not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/ade20k.py", "../_base_/schedule_160k.py"]

task = "segment"
model = dict(head="upernet", backbone="dinat_tiny", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.3))
optimizer = dict(no_decay=("norm", "rpb"))
precision = "float16"
