"""40,000 steps; 4 images on each of 8 GPUs make the "80k" of 16 images a step."""

iterations = 40_000
batch_size = 4
val_interval = 6
sync_batchnorm = True
optimizer = dict(name="adamw", lr=2e-4, weight_decay=1e-4)
schedule = dict(name="poly", power=0.9, final_factor=0.0)
