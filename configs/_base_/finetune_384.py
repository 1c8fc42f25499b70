"""30 epochs at 384 pixels from the weights of a model trained at 224, ``model.checkpoint=FILE``; evaluated uncropped.

Tables of position bias are resampled for the size. A file of `foveate train` or of the authors will do.
"""

_base_ = "imagenet.py"

data = dict(size=384, crop_pct=1.0)
batch_size = 64
epochs = 30
schedule = dict(name="cosine", warmup_epochs=0, final_factor=0.1)
