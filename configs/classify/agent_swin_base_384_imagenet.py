"""Agent-Swin-Base fine-tuned at 384 pixels on ImageNet-1k: the published recipe (arXiv 2312.08874).

FILE are the weights of agent_swin_base.

Command: foveate train classify/agent_swin_base_384_imagenet data.root=FOLDER model.checkpoint=FILE
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 84.9 % top-1; not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/finetune_384.py"

task = "classify"
model = dict(name="agent_swin_base_384")
data = dict(crop_mode="squash")
batch_size = 32
# 2e-5 for 512 images; 32 on each of 8 GPUs are 256.
optimizer = dict(name="adamw", lr=1e-5, weight_decay=1e-8, clip_grad=5.0)
schedule = dict(warmup_epochs=5)
