"""A detector fine-tuned on your own images, from a published backbone: COCO, VOC or YOLO, boxes or masks.

The format and the classes are recognised and said; where there are no held-out images a fifth of the training images
is held out. Objects that all have masks train Mask R-CNN, others Faster R-CNN.

Command: foveate train detect/finetune data.root=FOLDER model.backbone=nat_tiny
    so many batches by iterations=N; what a folder holds says `foveate data check FOLDER`
Expect: depends on the data. The settings are ours; not run by us on data of a size.
Cost: not measured by us.
"""

_base_ = "../_base_/finetune_dense.py"

task = "detect"
model = dict(head="auto", backbone="nat_tiny", pretrained=True, kwargs=dict(min_size=640, max_size=1024))
data = dict(
    name="auto",
    normalization="backbone",
    augment=dict(shorts=(480, 512, 544, 576, 608, 640, 672, 704), long=1024, flip=0.5),
)
epochs = 24
