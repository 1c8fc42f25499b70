"""36 epochs of COCO with 16 images a step: 2 on each of 8 GPUs."""

epochs = 36
batch_size = 2
optimizer = dict(name="adamw", lr=1e-4, weight_decay=0.05)
schedule = dict(name="step", steps=(27, 33), warmup_iterations=500, warmup_factor=0.001)
