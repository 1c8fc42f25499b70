"""Mask2Former on Cityscapes: crops of 512x1024 pixels, 90,000 steps."""

data = dict(
    num_classes=19,
    short=1024,
    long=2048,
    augment=dict(shorts=tuple(range(512, 2049, 102)), long=4096, crop=(512, 1024), flip=0.5, distortion=True),
)
iterations = 90_000
val_interval = 25
schedule = dict(name="poly", power=0.9, final_factor=0.0)
