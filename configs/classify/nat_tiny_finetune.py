"""NAT-Tiny fine-tuned on a folder or a list of your own photographs, from published weights, with layer decay.

FOLDER has train/CLASS/*.jpg and val/CLASS/*.jpg; or, with data.name=csv, train.csv and val.csv with the columns path
and label, where paths count from FOLDER. The stem learns with 1/26 of the classifier's rate.

Command: foveate train classify/nat_tiny_finetune data.root=FOLDER
    any model by model.name=; weights of a file by model.pretrained=False model.checkpoint=FILE
Expect: depends on the data. Layer decay is BEiT's (arXiv 2106.08254), the settings are ours; not run by us.
Cost: not measured by us.
"""

_base_ = "../_base_/folder.py"

task = "classify"
model = dict(name="nat_tiny", pretrained=True)
loss = dict(label_smoothing=0.1)
epochs = 30
batch_size = 32
workers = 4
optimizer = dict(name="adamw", lr=2e-4, weight_decay=0.05, layer_decay=0.9, clip_grad=1.0)
schedule = dict(warmup_epochs=2, final_factor=0.01)
