"""DiNAT-Large fine-tuned at 384 pixels on ImageNet-1k: the published recipe (arXiv 2209.15001).

It starts from the weights of ImageNet-22k at 224 pixels, with a new classifier; they are fetched.

Command: foveate train classify/dinat_large_384_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=dinat_large_384_11x11 model.checkpoint=dinat_large_384_11x11.shi_in22k, or
    model.name=dinat_s_large_384 model.checkpoint=dinat_s_large.shi_in22k optimizer.weight_decay=1e-5
Expect: the paper states 87.4 % top-1; with windows of 11x11 87.5; not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/finetune_384.py"

task = "classify"
model = dict(name="dinat_large_384", checkpoint="dinat_large.shi_in22k")
loss = dict(mixup=0.0, cutmix=0.0)
precision = "float32"
optimizer = dict(name="adamw", lr=5e-5, weight_decay=1e-10, clip_grad=5.0)
schedule = dict(name="poly", power=1.0, final_factor=0.0)
