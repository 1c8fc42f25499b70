"""UperNet on BiFormer-Base, 160k on ADE20K: the published recipe (arXiv 2303.08810).

The authors' own schedule file is missing; this is the usual one.

Command: foveate train segment/upernet_biformer_base_160k_ade20k data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 51.0 mIoU, 51.7 mIoU (multi-scale); not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/ade20k.py", "../_base_/schedule_160k.py"]

task = "segment"
model = dict(head="upernet", backbone="biformer_base", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.4))
optimizer = dict(no_decay=("norm",))
# Evaluation stretches images, a little, to multiples of 32 pixels, as published.
data = dict(divisor=32)
