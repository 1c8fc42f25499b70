"""ELA-S in MobileNetV2 on ImageNet-1k, by the defaults of the authors' script (arXiv 2403.01123).

Command: foveate train classify/ela_s_mobilenetv2_imagenet data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says; other sizes by
    model.name=ela_l_mobilenetv2, ela_s_resnet18 or ela_s_resnet50
Expect: the authors' logs end at up to 71.90 % top-1, and don't say with which variant; not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/folder.py"

task = "classify"
model = dict(name="ela_s_mobilenetv2")
data = dict(num_classes=1000, augment=dict(auto_augment=None, color_jitter=None, re_prob=0.0))
epochs = 200
batch_size = 256
workers = 8
precision = "bfloat16"
optimizer = dict(name="momentum", lr=0.1, weight_decay=1e-4, no_decay=(), kwargs=dict(momentum=0.9))
# The authors don't state how the rate falls.
schedule = dict(name="cosine", warmup_epochs=0, final_factor=0.0)
