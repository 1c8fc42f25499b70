"""The table of methods tells good maps from bad ones, and class-blind ones from others."""

import pytest
import timm
import torch
from foveate.tasks import TaskError
from foveate.tasks.data.samples import load_nuclei_patches
from foveate.tasks.seeing import evaluate
from torch import nn


class Spots(nn.Module):
    """Tells by the colour of a spot which of two classes an image has."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 4, 4, bias=False)
        self.fc = nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.features.weight.zero_()
            self.features.weight[[0, 1], [0, 1]] = 1 / 16
            self.fc.weight.copy_(20 * torch.eye(8)[:2])

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return 8 * self.fc(self.features(x).mean((2, 3)))


@pytest.fixture
def images():
    """Spots of a class's colour, each at a place of its own, and where they are."""
    x, masks = torch.zeros(6, 3, 32, 32), torch.zeros(6, 32, 32)
    for i in range(6):
        top, left = 4 * (i % 3) + 2, 4 * (5 - i) + 3
        x[i, i % 2, top : top + 8, left : left + 8] = 1
        masks[i, top : top + 8, left : left + 8] = 1
    return x, masks


def test_maps_of_the_class_win_and_blind_ones_are_found_out(images):
    x, masks = images
    methods = {name: evaluate.METHODS[name] for name in ("random map", "centred Gaussian", "Grad-CAM", "LayerCAM")}
    methods["rollout"] = evaluate.METHODS["rollout"]
    methods["truth"] = lambda model, x, target: x.sum(1)
    rows = {row["method"]: row for row in evaluate.evaluate(Spots(), x, masks, methods=methods, batch_size=4)}
    assert "note" in rows["rollout"]  # there is no attention
    assert rows["Grad-CAM"]["pointing"] == rows["LayerCAM"]["pointing"] == rows["truth"]["pixel AP"] == 1
    for name in ("random map", "centred Gaussian"):
        assert rows["Grad-CAM"]["pixel AP"] > 0.8 > rows[name]["pixel AP"]
        assert rows["Grad-CAM"]["deletion"] < rows[name]["deletion"]
        assert rows["Grad-CAM"]["insertion"] > rows[name]["insertion"]
        assert rows[name]["as with a random classifier"] == pytest.approx(1)
    # What only looks at the image doesn't change with the model.
    assert rows["truth"]["as with random weights"] == pytest.approx(1)
    assert rows["Grad-CAM"]["as with random weights"] < 0.8
    assert all(row.get("blank", 0) == 0 for row in rows.values())


def test_boxes_stand_in_for_masks_and_perturbing_may_be_left_out(images):
    x, masks = images
    boxes = evaluate.judge.boxes_of_masks(masks)
    methods = {"truth": lambda model, x, target: x.sum(1)}
    (row,) = evaluate.evaluate(Spots(), x, boxes=boxes, methods=methods, steps=None)
    assert row["MaxBoxAccV2"] == row["pointing"] == 1
    assert "insertion" not in row


def test_shuffling_keeps_the_entries_and_the_model():
    model = timm.create_model("resnet10t", num_classes=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = evaluate.shuffled(model, classifier_only=True)
    changed = {name for name, value in other.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {"fc.weight", "fc.bias"}
    assert "fc.weight" in changed
    assert torch.equal(other.fc.weight.flatten().sort().values, before["fc.weight"].flatten().sort().values)
    assert not torch.equal(evaluate.shuffled(model).conv1[0].weight, before["conv1.0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TaskError, match="Linear: has no get_classifier"):
        evaluate.shuffled(nn.Linear(2, 2), classifier_only=True)


def test_equal_ranks_are_shared():
    assert evaluate._ranks(torch.tensor([[3.0, 1.0, 3.0, 0.0]])).tolist() == [[2.5, 1.0, 2.5, 0.0]]


def test_patches_of_the_halves_are_of_a_nucleus_or_of_none():
    for split in ("train", "val"):
        patches, masks, labels = load_nuclei_patches(split)
        assert patches.shape == masks.shape == (len(labels), 32, 32)
        assert not masks[labels == 0].any()
        assert masks[labels == 1].mean((1, 2)).min() >= 0.125
        assert 0.1 < (labels == 0).mean() < 0.4
        # Nuclei are bright.
        assert patches[labels == 1].mean() > 2 * patches[labels == 0].mean()
