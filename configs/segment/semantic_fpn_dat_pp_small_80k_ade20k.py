"""Semantic FPN on DAT++-Small, 80k on ADE20K: the published recipe (arXiv 2309.01430).

40,000 steps of 32 images, which the authors call 80k.

Command: foveate train segment/semantic_fpn_dat_pp_small_80k_ade20k data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 49.9 mIoU, 50.7 mIoU (multi-scale); not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/ade20k.py", "../_base_/schedule_40k.py"]

task = "segment"
model = dict(head="semantic_fpn", backbone="dat_pp_small", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.4))
optimizer = dict(no_decay=("norm", "rpb"))
