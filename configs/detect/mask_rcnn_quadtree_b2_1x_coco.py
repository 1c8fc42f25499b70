"""Mask R-CNN on QuadTree-B2, 1x on COCO: the published recipe (arXiv 2201.02767).

Command: foveate train detect/mask_rcnn_quadtree_b2_1x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 46.7 box AP, 42.4 mask AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_single_scale.py", "../_base_/schedule_1x.py"]

task = "detect"
model = dict(head="mask_rcnn", backbone="quadtree_b2", pretrained=True, norm_eval=True)
optimizer = dict(lr=0.0002, weight_decay=0.0001, no_decay=())
