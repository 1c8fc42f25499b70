"""COCO 2017, ``data.root=FOLDER``: annotations/instances_{train,val}2017.json, train2017/ and val2017/."""

data = dict(
    name="coco",
    train=dict(annotations="annotations/instances_train2017.json", images="train2017"),
    val=dict(annotations="annotations/instances_val2017.json", images="val2017"),
    num_classes=80,
    # The published models never saw images without objects; what is broken in COCO's own file is left out.
    keep_empty=False,
    broken="drop",
)
workers = 4
