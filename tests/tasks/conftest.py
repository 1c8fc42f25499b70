"""A tiny labelled folder and a config that trains on it in seconds."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CONFIG = """
task = "classify"
model = dict(name="nat_atto", kwargs=dict(drop_path_rate=0.2))
data = dict(name="folder", root={root!r}, size=32, augment=dict(scale=(0.5, 1.0)))
batch_size = 6
epochs = 4
optimizer = dict(lr=1e-3)
schedule = dict(warmup_epochs=1)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of noise, bright and dark, of odd size: 7 images each to train, 3 to validate."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for name, low in (("bright", 128), ("dark", 0)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(low, low + 128, (23, 37, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def config_file(folder, tmp_path) -> Path:
    path = tmp_path / "noise.py"
    path.write_text(CONFIG.format(root=str(folder)))
    return path
