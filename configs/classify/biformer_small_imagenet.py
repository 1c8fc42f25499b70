"""BiFormer-Small on ImageNet-1k: the published recipe (arXiv 2303.08810).

Left out: three augmentations of each image in an epoch, and 10 epochs more at the last rate.

Command: foveate train classify/biformer_small_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=biformer_tiny, biformer_base or biformer_stl, each with its own drop path
Expect: the paper states 83.8 % top-1; Tiny 81.4, Base 84.3, the Swin layout (biformer_stl) 82.7; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/imagenet.py", "../_base_/schedule_300ep.py"]

task = "classify"
model = dict(name="biformer_small")
# To 1e-5.
schedule = dict(warmup_epochs=5, final_factor=1e-2)
