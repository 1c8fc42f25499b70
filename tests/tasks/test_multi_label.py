"""Classifiers of images that have several classes, or none: trained, measured, drawn and predicted with."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foveate.tasks import TaskError, engine
from foveate.tasks.classify import Task
from foveate.tasks.classify.multi_label import measure
from foveate.tasks.predictors import load_predictor
from foveate.tools.cli import main
from PIL import Image

LABELS = ("", "red", "red|green", " green | red |red", "green", "blue|green")


@pytest.fixture
def config(tmp_path):
    """A channel of noise for each class that an image has."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        lines = ["path,label"]
        for index in range(count):
            pixels = np.zeros((24, 24, 3), np.uint8)
            label = LABELS[index % 6]
            for channel, name in enumerate(("red", "green", "blue")):
                if name in label:
                    pixels[..., channel] = draw.integers(100, 256, (24, 24))
            Image.fromarray(pixels).save(tmp_path / f"{split}{index}.png")
            lines.append(f"{split}{index}.png,{label}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    path = tmp_path / "colours.py"
    path.write_text(
        'task = "classify"\nmodel = dict(name="nat_atto")\n'
        f'data = dict(name="csv", root={str(tmp_path)!r}, size=32, multi_label=True)\n'
        "batch_size = 6\nepochs = 3\noptimizer = dict(lr=3e-3)\n"
    )
    return path


def test_several_classes_are_learned_measured_drawn_and_predicted(config, tmp_path, capsys):
    result = engine.train(engine.load_config(config), tmp_path / "run", progress=False)
    last = result["history"][-1]
    assert result["metric"] == "map"
    assert {"val/map", "val/f1", "val/exact", "val/loss"} <= last.keys()
    assert last["train/loss"] < result["history"][0]["train/loss"]
    assert {name for name, _ in result["pictures"]} == {"curves.png", "worst.png", "best.png"}
    metrics, predictions, _ = engine.evaluate(engine.load_config(config), result["last"], progress=False)
    assert metrics["map"] == pytest.approx(last["val/map"])
    argv = [
        "predict",
        str(tmp_path / "val2.png"),
        "--checkpoint",
        str(result["last"]),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    shares = {ranked["class"]: ranked["probability"] for ranked in entry["classes"]}
    expected = predictions[2].sigmoid().tolist()
    assert [shares[name] for name in ("blue", "green", "red")] == pytest.approx(expected, abs=1e-4)
    predictor = load_predictor(result["last"])
    assert predictor.headline([("red", 0.9), ("green", 0.6), ("blue", 0.2)]) == "red (90.0%), green (60.0%)"
    assert predictor.headline([("red", 0.4)]) == "nothing"


def test_labels_are_split_and_weighed(config):
    task = Task(engine.load_config(config, ["data.balance=1", "loss.class_weights=balanced"]))
    assert task.classes == ["blue", "green", "red"]
    assert task.val_set.targets == [(), (2,), (2, 1), (1, 2), (1,), (0, 1)]
    assert task.val_set[3][1].tolist() == [0, 1, 1]
    assert task.check_data() == []
    assert task.class_weights.tolist() == pytest.approx([16 / 6, 16 / 24, 16 / 18])
    assert task.train_set.weights[:6].tolist() == pytest.approx([1.5, 2, 2, 2, 1.5, 6])
    logits, targets = torch.randn(4, 3), torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1]])
    loss = task.loss(lambda images: logits, torch.zeros(4, 3, 2, 2), targets)["loss"]
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(loss, (each * task.class_weights).mean())


def test_measures_are_means_over_the_classes_that_occur():
    logits = torch.tensor([[3.0, -1, 2], [2, -1, -2], [1, -1, -2], [-3, -1, -2]])
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]])
    measured = measure(logits, targets)
    # Ranked 1, 0, 1, 0: precision 1 and 2/3; and of the last class 1 and, among equals, 2/4.
    assert measured["map"] == pytest.approx(((1 + 2 / 3) / 2 + (1 + 2 / 4) / 2) / 2)
    assert measured["f1"] == pytest.approx((2 * 2 / (2 * 2 + 1) + 2 / (2 + 1)) / 2)
    assert measured["exact"] == 3 / 4
    assert "map" not in measure(logits, torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.mixup=0.2"], "loss.mixup is for one class an image"),
        (["data.name=folder"], "data.multi_label: of folder an image has one label"),
        (["data.multi_label=False"], "train.csv, line 2: has no label"),
    ],
)
def test_what_can_t_be_is_said(config, overrides, message):
    config = engine.load_config(config, overrides)
    with pytest.raises(TaskError, match=message):
        Task(config)


def test_several_classes_that_are_taken_for_one_are_refused(config, tmp_path):
    """As classes of their own, red|green would be learned, and say nothing."""
    listing = tmp_path / "train.csv"
    listing.write_text("\n".join(line for line in listing.read_text().splitlines() if not line.endswith(",")))
    with pytest.raises(TaskError, match=r"train.csv, line \d: '\w+\|\w+' names several .*data.multi_label=True"):
        Task(engine.load_config(config, ["data.multi_label=False"]))
