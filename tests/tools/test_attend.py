"""`foveate attend --evaluate`: tables of what each explanation is worth."""

import csv
import json

import numpy as np
import pytest
from foveate.tasks.data.classification import Digits
from foveate.tools.cli import main
from PIL import Image


def rows(file):
    with file.open(newline="") as lines:
        return {row["method"]: row for row in csv.DictReader(lines)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits on twice as wide paper, with the ink as mask and its box as annotation."""
    root = tmp_path_factory.mktemp("judged")
    images, annotations = [], []
    for index in range(12):
        digit = np.asarray(Digits("val").image(index).resize((32, 32)))
        paper = np.full((32, 64), 255, np.uint8)
        paper[:, 16:48] = digit
        ink = paper < 128
        for kind, values in (("images", paper), ("masks", ink.astype(np.uint8))):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(values).save(root / kind / f"{index}.png")
        ys, xs = np.nonzero(ink)
        box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
        images.append({"id": index, "file_name": f"{index}.png", "width": 64, "height": 32})
        annotations.append({"id": index + 1, "image_id": index, "category_id": 1, "bbox": box, "iscrowd": 0, "area": 9})
    listing = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "digit"}]}
    (root / "annotations.json").write_text(json.dumps(listing))
    return root


def test_a_folder_with_masks_and_one_with_boxes_are_judged(digits_run, folder, tmp_path, capsys):
    argv = ["attend", "--evaluate", str(folder), "--checkpoint", str(digits_run / "best.pth"), "--images", "6"]
    assert main([*argv, "--output", str(tmp_path), "--methods", "random map,relevance,Grad-CAM"]) == 0
    assert "6 images" in capsys.readouterr().out
    found = rows(tmp_path / "evaluate_folder.csv")
    assert [*found] == ["random map", "relevance", "Grad-CAM"]
    assert float(found["random map"]["as with random weights"]) == 1
    assert all(0 <= float(row["pixel AP"]) <= 1 and 0 <= float(row["insertion"]) <= 1 for row in found.values())

    (folder / "masks").rename(tmp_path / "masks")
    try:
        assert main([*argv, "--output", str(tmp_path), "--methods", "centred Gaussian,LayerCAM"]) == 0
    finally:
        (tmp_path / "masks").rename(folder / "masks")
    found = rows(tmp_path / "evaluate_folder.csv")
    assert [*found] == ["centred Gaussian", "LayerCAM"]
    # The crop to the square in the middle moves boxes along: the digit lies there.
    assert float(found["centred Gaussian"]["pointing"]) == 1
    assert float(found["centred Gaussian"]["MaxBoxAccV2"]) > 0.3


def test_what_cannot_be_judged_is_told(digits_run, folder, tmp_path, refused):
    file = str(digits_run / "best.pth")
    assert "name one classifier" in refused("attend", "--evaluate", str(folder))
    assert "no such folder; it holds the images" in refused("attend", "--evaluate", str(tmp_path), "--checkpoint", file)
    (tmp_path / "images").mkdir()
    message = refused("attend", "--evaluate", str(tmp_path), "--checkpoint", file)
    assert "neither masks/ nor annotations.json" in message
    (tmp_path / "masks").mkdir()
    assert "images: holds no image" in refused("attend", "--evaluate", str(tmp_path), "--checkpoint", file)
    Digits("val").image(0).save(tmp_path / "images" / "a.png")
    assert "a.png: has no mask" in refused("attend", "--evaluate", str(tmp_path), "--checkpoint", file)
    Image.new("L", (3, 3)).save(tmp_path / "masks" / "a.png")
    assert "is 3x3 pixels, but its image 8x8" in refused("attend", "--evaluate", str(tmp_path), "--checkpoint", file)
    Image.new("L", (8, 8)).save(tmp_path / "masks" / "a.png")
    assert "no image shows an object" in refused("attend", "--evaluate", str(tmp_path), "--checkpoint", file)
    assert "unknown model 'nat_ato'; did you mean 'nat_atto'?" in refused("attend", "--evaluate", "--model", "nat_ato")
    assert "unknown attention 'windov'" in refused("attend", "--evaluate", "--attention", "windov")
    assert "unknown method 'GradCAM'; did you mean 'Grad-CAM'?" in refused(
        "attend", "--evaluate", "--methods", "GradCAM"
    )


@pytest.mark.heavy
def test_bundled_classifiers_are_trained_once_and_judged(tmp_path, capsys):
    argv = ["attend", "--evaluate", "--epochs", "4", "--images", "24", "--output", str(tmp_path)]
    assert main(argv) == 0
    digits, nuclei = (rows(tmp_path / f"evaluate_{data}.csv") for data in ("digits", "nuclei"))
    assert float(digits["centred Gaussian"]["deletion"]) < float(digits["random map"]["deletion"])
    assert float(nuclei["Grad-CAM"]["pixel AP"]) > float(nuclei["random map"]["pixel AP"])
    # The second time nothing is trained, and all is the same but the clock.
    assert main(argv) == 0
    again = rows(tmp_path / "evaluate_nuclei.csv")
    for method, row in nuclei.items():
        assert {**row, "ms": ""} == {**again[method], "ms": ""}
