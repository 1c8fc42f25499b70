"""DINO on NAT-Atto finds the nuclei of the bundled micrograph, from scratch.

Command: foveate train detect/dino_nat_atto_nuclei
Expect: on the held-out half a box AP50 of 0.76 (box AP 0.38) after the last epoch. Mask R-CNN reaches 0.90 in less time
    (detect/mask_rcnn_nat_atto_nuclei): a transformer from scratch is slower to learn. As there, both halves are of one
    image.
Cost: 10 minutes on one of two CPU cores, the other at work
"""

_base_ = "../_base_/nuclei.py"

task = "detect"
# A small transformer, of fewer queries than the published 900.
model = dict(
    head="dino",
    backbone="nat_atto",
    kwargs=dict(
        channels=64,
        hidden=256,
        num_queries=200,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=3,
        denoising_queries=50,
        max_detections=200,
        min_size=256,
        max_size=512,
        mean=(0.125,) * 3,
        std=(0.093,) * 3,
    ),
)
# Boxes are in units of the image's sides: crops are of the size at which it is tested.
data = dict(
    repeat=80,
    augment=dict(shorts=(256,), long=512, ratio=(0.75, 1.33), crop=(512, 256), flip=0.5, flip_vertical=0.5, rotate=0.0),
)
epochs = 20
val_interval = 4
batch_size = 2
optimizer = dict(name="adamw", lr=1e-3, weight_decay=1e-4, clip_grad=0.1)
schedule = dict(warmup_iterations=20)
