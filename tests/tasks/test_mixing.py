"""What is drawn more often, weighs more, and is put together of several images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foveate.tasks import TaskError, engine
from foveate.tasks.classify import Task as Classify
from foveate.tasks.data import mixing
from foveate.tasks.data.mixing import Scene, copy_paste, mosaic
from foveate.tasks.data.occurrence import class_weights, draw_weights
from foveate.tasks.detect import Task as Detect
from foveate.tasks.engine.loading import Order


def scene(size, value, box, label, with_masks=True):
    """An image of one value with one object, two brighter."""
    x1, y1, x2, y2 = box
    pixels = np.full((*size, 3), value, np.uint8)
    pixels[y1:y2, x1:x2] += 2
    masks = np.zeros((1, *size), np.uint8)
    masks[0, y1:y2, x1:x2] = 1
    return Scene(pixels, np.array([box], float), np.array([label]), masks if with_masks else None)


@pytest.mark.parametrize("with_masks", [True, False])
def test_a_mosaic_holds_each_image_in_its_quarter_with_its_objects(with_masks):
    sizes = [(40, 60), (20, 90), (50, 30), (40, 60)]
    # Near the corner that lies at the common one, so that all of it is seen.
    boxes = [(40, 20, 58, 39), (2, 4, 12, 19), (20, 1, 28, 9), (1, 2, 9, 5)]
    scenes = [
        scene(size, 10 * (i + 1), box, i, with_masks) for i, (size, box) in enumerate(zip(sizes, boxes, strict=True))
    ]
    torch.manual_seed(0)
    whole = mosaic(scenes)
    assert whole.pixels.shape == (40, 60, 3)
    assert whole.labels.tolist() == [0, 1, 2, 3]
    for label, (x1, y1, x2, y2) in enumerate(whole.boxes.astype(int)):
        value = 10 * (label + 1) + 2
        assert (whole.pixels[y1:y2, x1:x2] == value).all()
        assert (whole.pixels == value).all(-1).sum() == (y2 - y1) * (x2 - x1)
        if with_masks:
            assert np.array_equal(whole.masks[label] > 0, (whole.pixels == value).all(-1))
    # The third image is too narrow for its quarter: there is grey beside it, and nowhere else.
    assert {10, 20, 30, 40, 114} <= set(np.unique(whole.pixels).tolist())
    # What reaches beyond the picture by more than nine tenths is left out.
    far = scene((40, 60), 10, (0, 0, 60, 1), 0, with_masks)
    for seed in range(5):
        torch.manual_seed(seed)
        assert len(mosaic([far] * 4).labels) == 2  # those at the inner edge


def test_pasted_objects_hide_what_is_behind(monkeypatch):
    target = scene((20, 30), 10, (2, 2, 12, 12), 0)
    source = scene((40, 25), 50, (8, 0, 16, 30), 1)
    monkeypatch.setattr(mixing.torch, "rand", torch.zeros)
    mixed = copy_paste(target, source)
    assert mixed.labels.tolist() == [0, 1]
    assert mixed.boxes.tolist() == [[2, 2, 8, 12], [8, 0, 16, 20]]
    assert (mixed.pixels[:, 8:16] == 52).all()
    assert (mixed.pixels[2:12, 2:8] == 12).all()
    assert mixed.masks.sum((1, 2)).tolist() == [60, 160]
    assert (target.pixels == scene((20, 30), 10, (2, 2, 12, 12), 0).pixels).all()
    hidden = copy_paste(scene((20, 30), 10, (8, 2, 12, 12), 0), source)
    assert hidden.labels.tolist() == [1]
    monkeypatch.setattr(mixing.torch, "rand", torch.ones)
    assert copy_paste(target, source).labels.tolist() == [0]


def test_a_detector_trains_on_mosaics_and_pasted_objects():
    short = ("data.repeat=1", "model.kwargs.mean=(0.1,0.1,0.1)", "data.augment.crop=128")
    config = engine.load_config("detect/mask_rcnn_nat_atto_nuclei", [*short, "data.mosaic=1", "data.copy_paste=1"])
    samples = Detect(config).train_set
    torch.manual_seed(0)
    image, target = samples[0]
    assert image.shape[1:] == target["masks"].shape[1:]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) > 0
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        rows, columns = np.nonzero(mask.numpy())
        inner = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (inner >= box[[0, 1, 0, 1]].numpy() - 2).all()
        assert (inner <= box[[2, 3, 2, 3]].numpy() + 2).all()
    options = ("model.head=faster_rcnn", "data.copy_paste=0.5", "model.kwargs={}")
    config = engine.load_config("detect/mask_rcnn_nat_atto_nuclei", options)
    with pytest.raises(TaskError, match=r"data.copy_paste cuts objects out by their masks; faster_rcnn has none"):
        Detect(config)
    with pytest.raises(TaskError, match=r"data.mosaic is 2, but must be a probability"):
        engine.load_config("detect/mask_rcnn_nat_atto_nuclei", ["data.mosaic=2"])


def test_rare_classes_are_drawn_as_often_as_frequent_ones():
    images = [[0]] * 90 + [[1, 0]] * 10 + [[]] * 20
    weights = draw_weights(images, 3, 1.0)
    assert weights[-1] == weights[0] < weights[90]
    assert weights[90] / weights[0] == pytest.approx(10)
    assert draw_weights(images, 3, 0.5, 2)[120 + 90] / weights[0] ** 0.5 == pytest.approx(10**0.5)
    weights = draw_weights([[0]] * 950 + [[1]] * 50, 2, 1.0)
    order = Order(1000, 5, weights=weights)
    drawn = [index for _, _, index in order]
    assert 440 < sum(index >= 950 for index in drawn) < 560
    assert drawn == [index for _, _, index in order]
    # Two processes share what one would have.
    parts = [[index for _, _, index in Order(1000, 5, rank, 2, weights)] for rank in range(2)]
    assert [index for pair in zip(*parts, strict=True) for index in pair] == drawn


def test_classes_weigh_what_the_config_says(config_file):
    weights = class_weights("balanced", torch.tensor([3, 0, 1]), list("abc"))
    assert weights.tolist() == pytest.approx([2 / 3, 0, 2])
    for wrong in ("even", (1.0,), (0.0, 0.0), (1.0, -1.0)):
        with pytest.raises(TaskError, match=r"loss.class_weights is .* must be balanced or 2 numbers"):
            class_weights(wrong, torch.tensor([1, 1]), ["a", "b"])
    task = Classify(engine.load_config(config_file, ["loss.class_weights=(1,3)", "data.balance=1"]))
    assert task.train_set.weights.tolist() == [2.0] * 14
    logits, targets = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    loss = task.loss(lambda images: logits, torch.zeros(6, 3, 4, 4), targets)["loss"]
    each = F.cross_entropy(logits, targets, reduction="none")
    expected = (each * torch.tensor([1.0, 3.0])[targets]).sum() / 12
    torch.testing.assert_close(loss, expected)
