"""NAT-Atto on the bundled handwritten digits, from scratch.

Command: foveate train classify/nat_atto_digits
"""

_base_ = "../_base_/digits.py"

task = "classify"
model = dict(name="nat_atto")
loss = dict(label_smoothing=0.1)
epochs = 24
batch_size = 32
optimizer = dict(name="adamw", lr=1.5e-3, weight_decay=0.05, clip_grad=1.0)
schedule = dict(warmup_epochs=1)
ema = 0.01
