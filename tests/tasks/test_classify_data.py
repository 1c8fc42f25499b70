import shutil

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.classify import Digits, InputRule, build_datasets
from PIL import Image

RULE = InputRule(32, 3, (0.5,) * 3, (0.5,) * 3)
DATA = {"name": "folder", "num_classes": None, "augment": {}}


def test_a_folder_gives_images_with_the_index_of_their_class(folder):
    train, val = build_datasets(DATA | {"root": str(folder)}, RULE)
    assert (len(train), len(val), train.classes) == (14, 6, ["bright", "dark"])
    image, label = val[5]
    assert image.shape == (3, 32, 32)
    assert label == 1
    assert image.mean() < 0


def test_validation_uses_the_order_of_the_training_classes(folder):
    (folder / "train" / "airy").mkdir()
    shutil.copy(folder / "train" / "bright" / "0.png", folder / "train" / "airy")
    _, val = build_datasets(DATA | {"root": str(folder)}, RULE)
    assert {label for _, label in val.samples} == {1, 2}


def test_grey_models_get_grey_images(folder):
    _, val = build_datasets(DATA | {"root": str(folder)}, InputRule(32, 1, (0.5,), (0.5,)))
    assert val[0][0].shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda root: shutil.rmtree(root), "images: no such folder"),
        (lambda root: shutil.rmtree(root / "val"), "val: no such folder"),
        (lambda root: (root / "train" / "empty").mkdir(), "train/empty: the class has no image"),
        (lambda root: (root / "val" / "dark").rename(root / "val" / "drak"), "did you mean 'dark'"),
        (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "train: holds no folder"),
    ],
)
def test_a_wrong_folder_is_named(folder, change, reason):
    change(folder)
    with pytest.raises(TaskError, match=reason):
        build_datasets(DATA | {"root": str(folder)}, RULE)


def test_wrong_settings_are_named(folder):
    with pytest.raises(TaskError, match=r"num_classes is 3, but .* has 2"):
        build_datasets(DATA | {"root": str(folder), "num_classes": 3}, RULE)
    with pytest.raises(TaskError, match=r"data\.root is not set"):
        build_datasets(DATA | {"root": None}, RULE)
    with pytest.raises(TaskError, match="did you mean 'digits'"):
        build_datasets(DATA | {"name": "digit"}, RULE)
    with pytest.raises(TaskError, match=r"data\.mean needs one number for each of the 1 channels"):
        InputRule(32, 1, (0.5,) * 3, (0.5,))


def test_the_digits_are_split_without_overlap_and_drawn_dark_on_white():
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1400, 397)
    assert train.pixels[:, 0, 0].min() == 255
    assert train.pixels.min() == 0


def test_the_affine_augmentation_moves_digits_and_evaluation_does_not():
    rule = InputRule(32, 1, (0.5,), (0.5,))
    digit = Digits("val").image(3)
    still = rule.transform()
    moving = rule.transform({"no_aug": True, "affine": {"degrees": 20, "translate": (0.1, 0.1), "fill": 255}})
    torch.manual_seed(0)
    assert torch.equal(still(digit), still(digit))
    assert not torch.allclose(moving(digit), moving(digit))
    assert moving(digit).shape == (1, 32, 32)


@pytest.mark.parametrize(("crop_mode", "visible"), [("center", False), ("squash", True)])
def test_squashing_keeps_what_a_crop_cuts_off(crop_mode, visible):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :10] = 255  # a bright left end
    rule = InputRule(20, 3, (0.0,) * 3, (1.0,) * 3, crop_mode=crop_mode)
    assert bool(rule.transform()(Image.fromarray(wide)).max() > 0.5) == visible
    with pytest.raises(TaskError, match=r"data.crop_mode is 'squish'; did you mean 'squash'\?"):
        InputRule(20, 3, (0.0,) * 3, (1.0,) * 3, crop_mode="squish")
