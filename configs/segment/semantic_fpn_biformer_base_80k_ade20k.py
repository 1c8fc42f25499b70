"""Semantic FPN on BiFormer-Base, 80k on ADE20K: the published recipe (arXiv 2303.08810).

Command: foveate train segment/semantic_fpn_biformer_base_80k_ade20k data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 49.9 mIoU; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/ade20k.py", "../_base_/schedule_40k.py"]

task = "segment"
model = dict(head="semantic_fpn", backbone="biformer_base", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.3))
optimizer = dict(no_decay=())
# Evaluation stretches images, a little, to multiples of 32 pixels, as published.
data = dict(divisor=32)
iterations = 80_000
schedule = dict(name="cosine", warmup_iterations=1000, warmup_factor=0.1, final_factor=5e-5)
precision = "float16"
