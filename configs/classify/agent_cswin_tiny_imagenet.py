"""Agent-CSWin-Tiny on ImageNet-1k: the published recipe (arXiv 2312.08874).

Left out: 10 epochs more at the last rate. The number is that of the averaged weights, as here.

Command: foveate train classify/agent_cswin_tiny_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=agent_cswin_small; agent_cswin_base with batch_size=64 optimizer.lr=5e-4
    optimizer.weight_decay=0.1 ema=8e-5
Expect: the paper states 83.1 % top-1; Small 83.9, Base 84.7; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/imagenet.py", "../_base_/schedule_300ep.py"]

task = "classify"
model = dict(name="agent_cswin_tiny")
data = dict(crop_mode="squash")
schedule = dict(final_factor=1e-2)
ema = 1.6e-4
