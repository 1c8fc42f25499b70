"""Mask2Former on COCO: large-scale jittering to 1024 pixels, 100 epochs of steps."""

data = dict(
    broken="drop",
    short=800,
    long=1333,
    augment=dict(shorts=(1024,), long=1024, ratio=(0.1, 2.0), crop=1024, flip=0.5),
)
# 737,500 steps; the learning rate falls after 655,556 and 710,184 of them.
iterations = 737_500
val_interval = 10
schedule = dict(name="step", steps=(89, 96))
