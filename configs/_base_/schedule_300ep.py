"""300 epochs of 1024 images a step: 128 on each of 8 GPUs; with others, scale optimizer.lr in proportion."""

epochs = 300
optimizer = dict(name="adamw", lr=1e-3, weight_decay=0.05)
# From 1e-6 to the rate, and down to 5e-6.
schedule = dict(name="cosine", warmup_epochs=20, warmup_factor=1e-3, final_factor=5e-3)
