"""Mask R-CNN on NAT-Atto finds and outlines the nuclei of the bundled micrograph, from scratch.

Command: foveate train detect/mask_rcnn_nat_atto_nuclei
Expect: on the held-out half box AP50 0.90 and mask AP50 0.92 after the last epoch (box AP 0.59, mask AP 0.62); 0.91 and
    0.90 with other random draws. The halves are of one image, and the settings were chosen by looking at the held-out
    one: it shows that training works, not how well it generalises.
Cost: 135 s of processor time; 5 minutes on two CPU cores with as much other work beside it.
"""

_base_ = "../_base_/nuclei.py"

task = "detect"
# Nuclei are 20 pixels wide, and so are the smallest anchors.
model = dict(
    head="mask_rcnn",
    backbone="nat_atto",
    kwargs=dict(
        channels=64,
        hidden=256,
        anchor_scales=(5.0,),
        anchor_samples=128,
        region_samples=64,
        min_size=256,
        max_size=512,
        mean=(0.125,) * 3,
        std=(0.093,) * 3,
    ),
)
data = dict(
    repeat=160,
    augment=dict(shorts=(256,), long=512, ratio=(0.75, 1.33), crop=128, flip=0.5, flip_vertical=0.5, rotate=0.5),
)
epochs = 6
val_interval = 2
batch_size = 4
optimizer = dict(name="adamw", lr=1e-3, weight_decay=0.05, clip_grad=1.0)
schedule = dict(warmup_iterations=20)
