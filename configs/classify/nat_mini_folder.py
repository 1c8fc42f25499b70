"""NAT-Mini on a folder of your own photographs, from scratch, with the published augmentation and schedule.

FOLDER/train/CLASS/*.jpg trains and FOLDER/val/CLASS/*.jpg is held out. With few of them, begin with published weights:
classify/nat_tiny_finetune. For ImageNet-1k there is classify/nat_tiny_imagenet.

Command: foveate train classify/nat_mini_folder data.root=FOLDER
Expect: depends on the data; not run by us.
Cost: not measured by us.
"""

_base_ = "classify/nat_tiny_imagenet"

model = dict(name="nat_mini")
data = dict(num_classes=None)
