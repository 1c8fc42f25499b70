"""ImageNet-1k, ``data.root=FOLDER`` with train/CLASS/*.JPEG and val/CLASS/*.JPEG, under DeiT's augmentation."""

_base_ = "folder.py"

data = dict(num_classes=1000)
loss = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0)
batch_size = 128
workers = 8
precision = "bfloat16"
