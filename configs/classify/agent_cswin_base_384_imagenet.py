"""Agent-CSWin-Base fine-tuned at 384 pixels on ImageNet-1k: the published recipe (arXiv 2312.08874).

FILE are the weights of agent_cswin_base. Left out: 10 epochs more at the last rate. The batch isn't stated.

Command: foveate train classify/agent_cswin_base_384_imagenet data.root=FOLDER model.checkpoint=FILE
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 85.8 % top-1; not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/finetune_384.py"

task = "classify"
model = dict(name="agent_cswin_base_384")
data = dict(crop_mode="squash", crop_pct=0.875)
batch_size = 32
epochs = 20
optimizer = dict(name="adamw", lr=5e-6, weight_decay=1e-8)
ema = 2e-4
