"""160,000 steps of 16 images: 2 on each of 8 GPUs; validated every 13 epochs of ADE20K, which are 16,000 steps."""

iterations = 160_000
batch_size = 2
val_interval = 13
sync_batchnorm = True
optimizer = dict(name="adamw", lr=6e-5, weight_decay=0.01)
schedule = dict(name="poly", power=1.0, warmup_iterations=1500, warmup_factor=1e-6, final_factor=0.0)
