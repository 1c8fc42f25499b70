"""Agent-DeiT-Small on ImageNet-1k: the published recipe (arXiv 2312.08874).

Command: foveate train classify/agent_deit_small_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=agent_deit_base; agent_deit_tiny with batch_size=512 optimizer.lr=4e-3; agent_deit_small_448 with
    data.size=448 batch_size=64 optimizer.lr=5e-4
Expect: the paper states 80.5 % top-1; Tiny 74.9, Base 82.0, Small at 448 pixels 83.1; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/imagenet.py", "../_base_/schedule_300ep.py"]

task = "classify"
model = dict(name="agent_deit_small")
data = dict(crop_mode="squash")
optimizer = dict(clip_grad=5.0)
schedule = dict(final_factor=1e-2)
