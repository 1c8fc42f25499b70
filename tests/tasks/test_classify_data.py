import shutil

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.data.classification import Digits, InputRule
from foveate.tasks.data.formats import open_classes, recognise
from PIL import Image

RULE = InputRule(32, 3, (0.5,) * 3, (0.5,) * 3)
DATA = {"name": "folder", "num_classes": None, "augment": {}}


def test_a_folder_gives_images_with_the_index_of_their_class(folder):
    train, val = open_classes(DATA | {"root": str(folder)}, RULE)
    assert (len(train), len(val), train.classes) == (14, 6, ["bright", "dark"])
    image, label = val[5]
    assert image.shape == (3, 32, 32)
    assert label == 1
    assert image.mean() < 0


def test_validation_uses_the_order_of_the_training_classes(folder):
    (folder / "train" / "airy").mkdir()
    shutil.copy(folder / "train" / "bright" / "0.png", folder / "train" / "airy")
    _, val = open_classes(DATA | {"root": str(folder)}, RULE)
    assert {label for _, label in val.samples} == {1, 2}


def test_grey_models_get_grey_images(folder):
    _, val = open_classes(DATA | {"root": str(folder)}, InputRule(32, 1, (0.5,), (0.5,)))
    assert val[0][0].shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda root: shutil.rmtree(root), "images: no such folder"),
        (lambda root: shutil.rmtree(root / "val"), "val: no such folder"),
        (lambda root: (root / "train" / "empty").mkdir(), "train/empty: the class has no image"),
        (
            lambda root: (root / "val" / "dark").rename(root / "val" / "drak"),
            "no such class is in train/ or the model; did you mean 'dark'",
        ),
        (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "train: holds no folder"),
    ],
)
def test_a_wrong_folder_is_named(folder, change, reason):
    change(folder)
    with pytest.raises(TaskError, match=reason):
        open_classes(DATA | {"root": str(folder)}, RULE)


def test_images_that_lie_in_no_class_are_named(folder):
    shutil.copy(folder / "train" / "bright" / "0.png", folder / "train" / "loose.png")
    with pytest.warns(UserWarning, match=r"train: left out, as in no class's folder: loose\.png \(1\)"):
        assert len(open_classes(DATA | {"root": str(folder)}, RULE)[0]) == 14


def test_a_class_without_images_is_a_class_and_parts_of_another_format_are_none(folder, tmp_path):
    (folder / "train" / "empty").mkdir()
    assert recognise(folder, "classes") == ("folder", {"train": "train", "val": "val"})
    for name in ("images", "masks"):
        (tmp_path / "pairs" / name).mkdir(parents=True)
        shutil.copy(folder / "train" / "bright" / "0.png", tmp_path / "pairs" / name)
    assert recognise(tmp_path / "pairs", "classes") is None


def test_wrong_settings_are_named(folder):
    with pytest.raises(TaskError, match=r"num_classes is 3, but .* has 2"):
        open_classes(DATA | {"root": str(folder), "num_classes": 3}, RULE)
    with pytest.raises(TaskError, match=r"data\.root is not set"):
        open_classes(DATA | {"root": None}, RULE)
    with pytest.raises(TaskError, match="did you mean 'digits'"):
        open_classes(DATA | {"name": "digit"}, RULE)
    with pytest.raises(TaskError, match=r"data\.mean needs one number for each of the 1 channels"):
        InputRule(32, 1, (0.5,) * 3, (0.5,))


def test_the_digits_are_split_without_overlap_and_drawn_dark_on_white():
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1400, 397)
    assert train.pixels[:, 0, 0].min() == 255
    assert train.pixels.min() == 0


def test_transforms_of_albumentations_come_before_timm_s():
    rule = InputRule(8, 1, (0.0,), (1.0,))
    turned = rule.transform({"no_aug": True, "transforms": [{"type": "Transpose", "p": 1}]})
    digit = Digits("val").image(0)
    assert torch.equal(turned(digit), rule.transform({"no_aug": True})(digit).mT)


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


def write_lists(folder, train="label,path\n10,train/bright/0.png\n2,train/dark/1.png\n", val="path,label\n"):
    (folder / "train.csv").write_text(train)
    (folder / "val.csv").write_text(val if "\n" in val.strip() else val + f"{folder}/val/dark/2.png,2\n")
    return DATA | {"name": "csv", "root": str(folder)}


def test_a_list_gives_images_with_the_index_of_their_label(folder):
    train, val = open_classes(write_lists(folder), RULE)
    # Labels that are all numbers are ordered as such; paths may be absolute, and columns in any order.
    assert (train.classes, val.classes) == (["2", "10"], ["2", "10"])
    assert [label for _, label in train.samples] == [1, 0]
    image, label = val[0]
    assert image.shape == (3, 32, 32)
    assert (label, len(val)) == (0, 1)
    lists = write_lists(folder) | {"train": "other.csv", "val": str(folder / "val.csv")}
    (folder / "other.csv").write_text("\ufeffpath,label,note\r\ntrain/bright/0.png,2,x\r\n", encoding="utf-8")
    assert open_classes(lists, RULE)[0].classes == ["2"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"train": "path;label\na.png;1\n"}, r"train\.csv, line 1: has no column 'path', but 'path;label'"),
        ({"train": ""}, r"train\.csv, line 1: has no column 'path', but nothing"),
        ({"train": "path,label\n"}, r"train\.csv: lists no image"),
        ({"train": "path,label\ntrain/dark/0.png,\n"}, r"train\.csv, line 2: has no label"),
        ({"train": "path,label\ntrain/dark/0.png,a\ntrain/dark/9.png,a\n"}, r"line 3: .*9\.png: no such file; paths"),
        (
            {"train": "path,label\ntrain/dark/0.png,cat, black\n"},
            r"train\.csv, line 2: has 3 fields, but line 1 2; put what holds a comma in quotes",
        ),
        ({"train": "path,label\ntrain.csv,a\n"}, r"train\.csv, line 2: .*train\.csv: is no image"),
        (
            {"train": "path,label\ntrain/dark/0.png,a\n\ntrain/dark/0.png,b\n"},
            r"line 4: train/dark/0\.png is labelled 'b' here and 'a' in line 2",
        ),
        (
            {"train": "path,label\ntrain/dark/0.png,cat\n", "val": "path,label\nval/dark/0.png,cta\n"},
            r"val\.csv, line 2: there is no class 'cta'; did you mean 'cat'",
        ),
    ],
)
def test_a_wrong_line_of_a_list_is_named(folder, change, reason):
    with pytest.raises(TaskError, match=reason):
        open_classes(write_lists(folder, **change), RULE)


def test_a_missing_list_is_named(folder):
    data = DATA | {"name": "csv", "root": str(folder)}
    with pytest.raises(TaskError, match=r"train\.csv: no such list; it is a CSV file with the columns path and label"):
        open_classes(data, RULE)
    (folder / "train.csv").write_bytes("path,label\ntrain/dark/0.png,grün\n".encode("latin-1"))
    with pytest.raises(TaskError, match=r"train\.csv: is not text in UTF-8"):
        open_classes(data, RULE)


def test_what_systems_hide_or_add_is_no_class(folder, tmp_path):
    expected = open_classes(DATA | {"root": str(folder)}, RULE)
    for hidden in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        for place in ("train", "train/dark", "val"):
            (folder / place / hidden).mkdir()
            shutil.copy(folder / "train" / "dark" / "0.png", folder / place / hidden / "0.png")
    shutil.copy(folder / "train" / "dark" / "0.png", folder / "train" / "dark" / "._0.png")
    found = open_classes(DATA | {"root": str(folder)}, RULE)
    for before, after in zip(expected, found, strict=True):
        assert after.classes == ["bright", "dark"]
        assert after.samples == before.samples


def test_linked_folders_are_followed_once(folder, tmp_path):
    expected = len(open_classes(DATA | {"root": str(folder)}, RULE)[0])
    (folder / "train" / "dark").rename(tmp_path / "away")
    (folder / "train" / "dark").symlink_to(tmp_path / "away", target_is_directory=True)
    (tmp_path / "away" / "again").symlink_to(tmp_path / "away", target_is_directory=True)
    assert len(open_classes(DATA | {"root": str(folder)}, RULE)[0]) == expected
