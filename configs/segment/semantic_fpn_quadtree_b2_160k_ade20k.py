"""Semantic FPN on QuadTree-B2, 160k on ADE20K: the published recipe (arXiv 2201.02767).

Command: foveate train segment/semantic_fpn_quadtree_b2_160k_ade20k data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 48.7 mIoU; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/ade20k.py", "../_base_/schedule_160k.py"]

task = "segment"
model = dict(head="semantic_fpn", backbone="quadtree_b2", pretrained=True)
optimizer = dict(no_decay=("norm",), factors={"head.": 10.0, "head.neck.": 1.0})
# Evaluation stretches images, a little, to multiples of 32 pixels, as published.
data = dict(divisor=32)
