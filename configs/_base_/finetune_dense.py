"""Detectors and segmenters on images of one's own, from a published backbone: ours."""

import torch

# By the machine: GPUs take larger batches, and half precision where they are fast at it.
batch_size = 8 if torch.cuda.is_available() else 2
precision = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
workers = None
optimizer = dict(name="adamw", lr=1e-4, weight_decay=0.05, clip_grad=1.0, factors={"backbone.": 0.5})
schedule = dict(warmup_factor=0.01, final_factor=0.01)
