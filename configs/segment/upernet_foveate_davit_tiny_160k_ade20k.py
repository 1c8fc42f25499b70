"""UperNet on DaViT-Tiny, 160k on ADE20K: the published recipe (arXiv 2204.03645).

Command: foveate train segment/upernet_foveate_davit_tiny_160k_ade20k data.root=FOLDER
    by torchrun on 8 GPUs, as `foveate train --help` says
Expect: the paper states 46.3 mIoU; not run by us.
Cost: not measured by us.
"""

_base_ = ["../_base_/ade20k.py", "../_base_/schedule_160k.py"]

task = "segment"
model = dict(head="upernet", backbone="foveate_davit_tiny", pretrained=True, backbone_kwargs=dict(drop_path_rate=0.3))
optimizer = dict(no_decay=())
sync_batchnorm = False
