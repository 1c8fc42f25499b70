"""Mask R-CNN on DaViT-Base, 3x on COCO: the published recipe (arXiv 2204.03645).

Command: foveate train detect/mask_rcnn_foveate_davit_base_3x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 49.9 box AP, 44.6 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_3x.py"]

task = "detect"
model = dict(head="mask_rcnn", backbone="foveate_davit_base", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.2))
optimizer = dict(no_decay=())
