"""QuadTree-B2 on ImageNet-1k: the published recipe (arXiv 2201.02767).

Left out: three augmentations of each image in an epoch.

Command: foveate train classify/quadtree_b2_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=quadtree_b0 or quadtree_b1; quadtree_b3 and quadtree_b4 with optimizer.clip_grad=1.0
Expect: the authors state 82.7 % top-1; B0 72.0, B1 80.0, B3 83.8, B4 84.0; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/imagenet.py", "../_base_/schedule_300ep.py"]

task = "classify"
model = dict(name="quadtree_b2")
# To 1e-5.
schedule = dict(warmup_epochs=5, final_factor=1e-2)
