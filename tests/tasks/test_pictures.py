import numpy as np
import pytest
import timm
import torch
from foveate.blocks import NeighborhoodAttention2d
from foveate.tasks import TaskError
from foveate.tasks.pictures.classes import draw_confusion, draw_gallery
from foveate.tasks.pictures.figures import draw_curve, draw_neighborhoods, find_neighborhoods
from PIL import Image


def test_the_weights_of_a_neighborhood_are_those_the_block_uses():
    block = NeighborhoodAttention2d(8, num_heads=2, kernel_size=3, dilation=2)
    x = torch.randn(1, 9, 11, 8)
    ((name, found, weights),) = find_neighborhoods(torch.nn.Sequential(block), x)
    assert name == "0"
    assert found is block
    assert weights.shape == (9, 11, 2, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(9, 11, 2))
    torch.testing.assert_close(weights, block.attention_map(x)[0])


def test_a_neighborhood_is_drawn_on_images_that_are_not_square(tmp_path):
    model = timm.create_model("nat_atto", num_classes=3).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (45, 70, 3), np.uint8))
    draw_neighborhoods(image, model, torch.randn(1, 3, 45, 70), [(0.99, 0.0), (0.5, 0.5)], tmp_path / "seen.png")
    assert (tmp_path / "seen.png").stat().st_size > 10_000
    with pytest.raises(TaskError, match="ResNet has no neighborhood attention"):
        draw_neighborhoods(
            image, timm.create_model("resnet18"), torch.randn(1, 3, 64, 64), [(0, 0)], tmp_path / "no.png"
        )


def test_galleries_curves_and_confusions_of_any_length_are_drawn(tmp_path):
    image = Image.fromarray(np.zeros((8, 8), np.uint8))
    ranking = [("cat", 0.9), ("dog", 0.1)]
    draw_gallery([image] * 3, ["cat", "dog", "cat"], [ranking] * 3, tmp_path / "gallery.png", "three", columns=2)
    draw_confusion([0, 1, 1], [0, 0, 1], ["cat", "dog"], tmp_path / "confusion.png")
    draw_confusion(range(50), range(50), [f"class {i}" for i in range(50)], tmp_path / "many.png")
    history = [{"epoch": 1, "train/loss": 1.0}, {"epoch": 2, "train/loss": 0.5, "val/accuracy": 0.7}]
    draw_curve(history, "accuracy", tmp_path / "curve.png")
    assert len(list(tmp_path.iterdir())) == 4
