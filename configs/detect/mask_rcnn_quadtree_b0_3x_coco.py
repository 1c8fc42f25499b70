"""Mask R-CNN on QuadTree-B0, 3x on COCO: the published recipe (arXiv 2201.02767).

Command: foveate train detect/mask_rcnn_quadtree_b0_3x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: no result was published, and it was not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_multi_scale.py", "../_base_/schedule_3x.py"]

task = "detect"
model = dict(head="mask_rcnn", backbone="quadtree_b0", pretrained=True, norm_eval=True)
optimizer = dict(no_decay=("norm",))
