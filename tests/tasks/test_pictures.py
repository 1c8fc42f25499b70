import numpy as np
from foveate.tasks.pictures.classes import draw_confusion, draw_gallery
from foveate.tasks.pictures.figures import draw_curve
from PIL import Image


def test_galleries_curves_and_confusions_of_any_length_are_drawn(tmp_path):
    image = Image.fromarray(np.zeros((8, 8), np.uint8))
    ranking = [("cat", 0.9), ("dog", 0.1)]
    draw_gallery([image] * 3, ["cat", "dog", "cat"], [ranking] * 3, tmp_path / "gallery.png", "three", columns=2)
    draw_confusion([0, 1, 1], [0, 0, 1], ["cat", "dog"], tmp_path / "confusion.png")
    draw_confusion(range(50), range(50), [f"class {i}" for i in range(50)], tmp_path / "many.png")
    history = [{"epoch": 1, "train/loss": 1.0}, {"epoch": 2, "train/loss": 0.5, "val/accuracy": 0.7}]
    draw_curve(history, "accuracy", tmp_path / "curve.png")
    assert len(list(tmp_path.iterdir())) == 4
