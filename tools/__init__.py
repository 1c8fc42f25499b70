"""The commands: ``foveate train`` is ``tools/train.py``, which also runs as a script."""
