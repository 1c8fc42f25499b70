"""A classifier fine-tuned on your own images, from published weights: folders of classes, or lists.

The format is recognised and said: FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg, FOLDER/CLASS/*.jpg, of which a
fifth is held out, or train.csv and val.csv with the columns path and label.

Command: foveate train classify/finetune data.root=FOLDER model.name=nat_tiny
    so many batches by iterations=N
Expect: depends on the data. Layer decay is BEiT's (arXiv 2106.08254), the settings are ours; not run by us on data of
    a size.
Cost: not measured by us.
"""

import torch

_base_ = "nat_tiny_finetune.py"

task = "classify"
data = dict(name="auto", normalization="backbone")
batch_size = 64 if torch.cuda.is_available() else 16
precision = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
workers = None
