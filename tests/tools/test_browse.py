import numpy as np
import pytest
from foveate.tools.cli import main
from PIL import Image


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(
    ("recipe", "overrides", "printed"),
    [
        ("classify/nat_atto_digits", [], "1400 images to train on, 397 held out"),
        ("classify/nat_atto_digits", ["loss.mixup=0.5", "loss.cutmix=1.0"], "10 classes: 0, 1, 2"),
        ("detect/mask_rcnn_nat_atto_nuclei", [], "1 class: nucleus"),
        ("segment/upernet_nat_atto_nuclei", [], "2 classes: background, nucleus"),
        ("segment/mask2former_nat_atto_nuclei", [], "2 classes: background, nucleus"),
    ],
)
def test_training_data_are_drawn_after_augmentation(recipe, overrides, printed, tmp_path, capsys):
    argv = ["browse", recipe, *overrides, "--count", "4", "--output"]
    assert main([*argv, str(tmp_path / "one.png")]) == 0
    assert printed in capsys.readouterr().out
    first = pixels(tmp_path / "one.png")
    assert first.std() > 10
    assert main([*argv, str(tmp_path / "again.png")]) == 0
    assert np.array_equal(first, pixels(tmp_path / "again.png"))
    assert main([*argv, str(tmp_path / "other.png"), "--seed", "1"]) == 0
    assert not np.array_equal(first, pixels(tmp_path / "other.png"))


def test_one_image_is_drawn_as_all_that_it_becomes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["browse", "classify/nat_atto_digits", "--same", "7", "--count", "3"]) == 0
    assert pixels(tmp_path / "runs/browse/nat_atto_digits.png").std() > 10


@pytest.mark.parametrize("recipe", ["detect/mask_rcnn_nat_atto_nuclei", "segment/mask2former_nat_atto_nuclei"])
def test_held_out_images_are_drawn_as_they_are(recipe, tmp_path):
    argv = ["browse", recipe, "--split", "val", "--same", "0", "--count", "1", "--output"]
    assert main([*argv, str(tmp_path / "val.png")]) == 0
    assert main([*argv, str(tmp_path / "other.png"), "--seed", "5"]) == 0
    assert np.array_equal(pixels(tmp_path / "val.png"), pixels(tmp_path / "other.png"))


def test_a_wrong_request_is_refused(refused):
    recipe = "classify/nat_atto_digits"
    assert "--count is 0, but must be from 1 to 100" in refused("browse", recipe, "--count", "0")
    assert "counted from 0 to 1399" in refused("browse", recipe, "--same", "1400")
    assert "data.root is not set" in refused("browse", "classify/nat_mini_folder")
