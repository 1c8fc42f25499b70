"""NAT-Mini on a folder of your own photographs, from scratch, with the published augmentation and schedule.

FOLDER/train/CLASS/*.jpg trains and FOLDER/val/CLASS/*.jpg is held out. For ImageNet-1k on several GPUs:
torchrun --nproc-per-node 8 -m foveate.tools.train classify/nat_mini_folder data.root=FOLDER batch_size=128

Command: foveate train classify/nat_mini_folder data.root=FOLDER
Expect: on ImageNet-1k the paper states 81.8 % top-1 (arXiv 2204.07143); not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/folder.py"

task = "classify"
model = dict(name="nat_mini", kwargs=dict(drop_path_rate=0.2))
loss = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0)
epochs = 300
batch_size = 128
workers = 8
precision = "bfloat16"
# The learning rate is that of 1024 images a step, over all processes.
optimizer = dict(name="adamw", lr=1e-3, weight_decay=0.05, clip_grad=5.0)
schedule = dict(warmup_epochs=20, warmup_factor=1e-3, final_factor=5e-3)
