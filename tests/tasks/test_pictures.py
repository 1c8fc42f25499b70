import warnings

import numpy as np
import pytest
import torch
from foveate.tasks.data.coco import encode_mask
from foveate.tasks.metrics.confusion import confuse_labels
from foveate.tasks.pictures.classes import draw_confusion, draw_gallery
from foveate.tasks.pictures.figures import choose_styles, draw_curve, new_figure, save_figure
from foveate.tasks.pictures.naming import place_names
from foveate.tasks.pictures.objects import draw_objects
from foveate.tasks.pictures.regions import draw_overlay
from matplotlib.colors import to_rgb
from PIL import Image


def test_galleries_curves_and_confusions_of_any_length_are_drawn(tmp_path):
    image = Image.fromarray(np.zeros((8, 8), np.uint8))
    ranking = [("cat", 0.9), ("dog", 0.1)]
    draw_gallery([image] * 3, ["cat", "dog", "cat"], [ranking] * 3, tmp_path / "gallery.png", "three", columns=2)
    draw_confusion(confuse_labels([0, 1, 1], [0, 0, 1], 2), ["cat", "dog"], tmp_path / "confusion.png")
    draw_confusion(np.eye(50, dtype=int), [f"class {i}" for i in range(50)], tmp_path / "many.png")
    history = [{"epoch": 1, "train/loss": 1.0}, {"epoch": 2, "train/loss": 0.5, "val/accuracy": 0.7}]
    draw_curve(history, "accuracy", tmp_path / "curve.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_names_of_overlapping_objects_hide_none():
    boxes = np.array([[10, 20, 90, 80], [12, 22, 92, 82], [11, 21, 89, 79], [0, 0, 20, 10], [70, 60, 100, 100]], float)
    sizes = [(30.0, 9.0)] * len(boxes)
    places = place_names(boxes, sizes, 100, 100)
    for index, (x, y) in enumerate(places):
        assert 0 <= x <= 70
        assert 0 <= y <= 91
        for other_x, other_y in places[:index]:
            assert abs(x - other_x) >= 30 or abs(y - other_y) >= 9
    # A picture that is too small for all of them still has each.
    assert len(place_names(boxes, [(80.0, 60.0)] * len(boxes), 100, 100)) == len(boxes)


def test_a_region_is_outlined_in_the_colour_of_the_legend():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    labels = np.zeros((60, 90), np.uint8)
    labels[20:40, 30:60] = 1
    figure = new_figure(4, 3)
    axes = figure.subplots()
    styles = choose_styles([0, 1], ["ground", "tree"])
    draw_overlay(axes, Image.fromarray(pixels), labels, styles)
    shown = np.asarray(axes.get_images()[0].get_array())
    for row, column, label in ((20, 40, 1), (30, 30, 1), (19, 40, 0), (30, 60, 0)):
        assert shown[row, column] == pytest.approx(to_rgb(styles[label][0]), abs=1e-3)
    tint = 0.45 * pixels[30, 45] / 255 + 0.55 * np.array(to_rgb(styles[1][0]))
    assert shown[30, 45] == pytest.approx(tint, abs=1e-3)


@pytest.mark.parametrize("size", [(60, 1), (1, 60), (1, 1), (40, 30)])
def test_masks_of_a_line_of_pixels_and_names_of_any_length_are_drawn(size, tmp_path):
    mask = np.zeros(size[::-1], np.uint8)
    mask.flat[: mask.size // 2 + 1] = 1
    objects = {
        "boxes": torch.tensor([[0.0, 0, *size]]),
        "labels": [0],
        "scores": torch.ones(1),
        "masks": [encode_mask(mask)],
    }
    figure = new_figure(8, 6)
    axes = figure.subplots()
    name = "n" * 300
    draw_objects(axes, Image.new("RGB", size), objects, [name], choose_styles([0], [name]))
    axes.set(yticks=[0], yticklabels=[name], title=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "picture.png")
    assert axes.get_title() == f"{'n' * 37}..."


def test_a_picture_without_room_for_its_axes_is_written_without_a_word(tmp_path):
    figure = new_figure(4, 0.1)
    figure.subplots().set(title="above a line of pixels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").is_file()
