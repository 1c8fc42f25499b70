"""ADE20K's SceneParse150, ``data.root=FOLDER``: images/ and annotations/, each with training/ and validation/."""

data = dict(
    name="ade20k",
    num_classes=150,
    short=512,
    long=2048,
    augment=dict(shorts=(512,), long=2048, ratio=(0.5, 2.0), crop=512, max_share=0.75, flip=0.5, distortion=True),
)
workers = 4
