"""COCO 2017 at 800x1333 pixels, mirrored."""

_base_ = "coco.py"

data = dict(augment=dict(shorts=(800,), long=1333, flip=0.5))
