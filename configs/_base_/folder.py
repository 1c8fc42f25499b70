"""A folder of your own, ``data.root=FOLDER``: FOLDER/train/CLASS/*.jpg trains, FOLDER/val/CLASS/*.jpg is held out."""

data = dict(
    name="folder",
    size=224,
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_pct=0.875,
    augment=dict(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel"),
)
