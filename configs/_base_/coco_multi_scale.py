"""COCO 2017 at 480 to 800 pixels, half of the images cropped before: DETR's augmentation, as Swin's authors used it."""

_base_ = "coco.py"

data = dict(augment=dict(shorts=tuple(range(480, 801, 32)), long=1333, crop_policy=True, flip=0.5))
