"""RetinaNet on QuadTree-B3, 1x on COCO: the published recipe (arXiv 2201.02767).

Command: foveate train detect/retinanet_quadtree_b3_1x_coco data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 47.3 box AP; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/coco_single_scale.py", "../_base_/schedule_1x.py"]

task = "detect"
model = dict(head="retinanet", backbone="quadtree_b3", pretrained=True, norm_eval=True)
optimizer = dict(weight_decay=0.0001, no_decay=())
