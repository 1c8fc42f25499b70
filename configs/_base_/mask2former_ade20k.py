"""Mask2Former on ADE20K: crops of 640 pixels, 160,000 steps."""

data = dict(
    num_classes=150,
    short=640,
    long=2560,
    augment=dict(shorts=tuple(range(320, 1281, 64)), long=2560, crop=640, flip=0.5, distortion=True),
)
iterations = 160_000
val_interval = 4
schedule = dict(name="poly", power=0.9, final_factor=0.0)
