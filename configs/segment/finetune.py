"""A segmenter fine-tuned on your own images, from a published backbone: masks, or the polygons of COCO and YOLO.

The format and the classes are recognised and said; where there are no held-out images a fifth of the training images
is held out. Of objects with masks the pixels around them are the class background.

Command: foveate train segment/finetune data.root=FOLDER model.backbone=nat_tiny
    so many batches by iterations=N; objects told apart by model.head=mask2former model.output=instance
Expect: depends on the data. The settings are ours; not run by us on data of a size.
Cost: not measured by us.
"""

_base_ = "../_base_/finetune_dense.py"

task = "segment"
model = dict(head="upernet", backbone="nat_tiny", pretrained=True)
data = dict(
    name="auto",
    normalization="backbone",
    short=512,
    long=2048,
    augment=dict(shorts=(512,), long=2048, ratio=(0.5, 2.0), crop=512, flip=0.5),
)
epochs = 40
