"""`foveate data`: what a folder holds is named, counted and drawn, and written in another format."""

import json

import numpy as np
import pytest
from foveate.tools.cli import main
from PIL import Image

from ..tasks.test_tiles import write_tiled


def write(path, content="", size=(30, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        pixels = np.random.default_rng(0).integers(0, 2, size, np.uint8) if content == "map" else np.zeros((*size, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    else:
        path.write_text(content)


def yolo(root):
    for split, count in (("train", 3), ("val", 1)):
        for index in range(count):
            write(root / "images" / split / f"{index}.png")
            write(root / "labels" / split / f"{index}.txt", "1 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.6 0.1 0.6 0.7\n")
    write(root / "data.yaml", "train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return "objects in the format yolo, 2 classes", "train: 3 images, 6 objects"


def roboflow(root):
    for split in ("train", "valid"):
        write(root / split / "a.png")
        box = {"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 2, 10, 20], "segmentation": []}
        content = {"images": [{"id": 0, "file_name": "a.png", "height": 30, "width": 40}], "annotations": [box]}
        content["categories"] = [
            {"id": 0, "name": "pets", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "pets"},
        ]
        write(root / split / "_annotations.coco.json", json.dumps(content))
    return "objects in the format coco, 1 classes", "val: 1 images, 1 objects"


def label_studio(root):
    write(root / "images" / "a.png")
    content = {"images": [{"id": 0, "file_name": "images\\a.png", "height": 30, "width": 40}], "annotations": []}
    write(root / "result.json", json.dumps(content | {"categories": [{"id": 0, "name": "cat"}]}))
    return "objects in the format coco, 1 classes", "no held-out images"


def voc(root):
    write(root / "JPEGImages" / "a.png")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    write(root / "Annotations" / "a.xml", f"<annotation><object><name>bolt</name>{box}</object></annotation>")
    write(root / "ImageSets" / "Main" / "train.txt", "a\n")
    return "objects in the format voc, 1 classes", "1 bolt"


def masks(root):
    for split in ("train", "val"):
        write(root / "images" / split / "a.png")
        write(root / "masks" / split / "a.png", "map")
    write(root / "classes.txt", "ground\ntree\n")
    return "maps in the format folder, 2 classes", "1 tree"


def folders(root):
    for name in ("cat", "dog"):
        for index in range(3):
            write(root / name / f"{index}.png")
    return "classes in the format folder, 2 classes", "train: 6 images, 6 labels"


@pytest.mark.parametrize("make", [yolo, roboflow, label_studio, voc, masks, folders])
def test_a_folder_s_format_is_named_counted_and_drawn(make, tmp_path, capsys):
    expected = make(tmp_path / "data")
    assert main(["data", "check", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in expected), text
    assert text.endswith("no faults\n")
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert min(picture.size) > 150


def test_faults_are_listed_and_what_is_none_is_said(tmp_path, capsys):
    yolo(tmp_path / "data")
    write(tmp_path / "data" / "labels" / "val" / "0.txt", "5 0.5 0.5 0.1 0.1\n")
    assert main(["data", "check", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 2
    assert "fault: " in (text := capsys.readouterr().out)
    assert "1 unknown category" in text
    assert text.endswith("leave them out with data.broken=drop\n")
    assert main(["data", "check", str(tmp_path / "out")]) == 2
    assert "is in no known format" in capsys.readouterr().err


@pytest.mark.parametrize("make", [yolo, masks, folders])
def test_images_that_end_early_are_faults_and_the_others_are_drawn(make, tmp_path, capsys):
    make(tmp_path / "data")
    whole = sorted(file for file in (tmp_path / "data").rglob("*.png") if "masks" not in file.parts)
    write(whole[0].with_name("z.png"), size=(30, 40))
    if make is masks:
        write(tmp_path / "data" / "masks" / "train" / "z.png", "map")
    whole[0].write_bytes(whole[0].read_bytes()[:50])
    assert main(["data", "check", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().out
    assert f"fault: {whole[0]}: not an image, or damaged" in text
    assert text.endswith("leave them out with damaged_images=skip\n")
    assert f"samples: {tmp_path / 'out' / 'samples.png'}" in text
    assert (tmp_path / "out" / "samples.png").is_file()
    for file in [*whole, whole[0].with_name("z.png")]:
        file.write_bytes(file.read_bytes()[:50])
    assert main(["data", "check", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 2
    assert "samples: " not in capsys.readouterr().out


def test_a_set_is_converted_and_what_is_lost_is_named_first(tmp_path, capsys):
    yolo(tmp_path / "data")
    there, back = tmp_path / "coco", tmp_path / "back"
    assert main(["data", "convert", str(tmp_path / "data"), str(there), "--to", "coco"]) == 0
    assert main(["data", "convert", str(there), str(back), "--to", "yolo", "--link"]) == 0
    text = capsys.readouterr().out
    assert "yolo can't hold: 4 ids of images" in text
    assert text.index("can't hold") < text.index("coco to yolo: 3 images of train, 1 images of val, 2 classes")
    assert (back / "images" / "train" / "0.png").is_symlink()
    line, other = (back / "labels" / "val" / "0.txt").read_text().splitlines()
    assert line == "1 0.5 0.5 0.25 0.5"
    assert np.allclose(list(map(float, other.split())), [0, 0.1, 0.1, 0.6, 0.1, 0.6, 0.7], atol=1e-6)
    assert main(["data", "convert", str(tmp_path / "data"), str(there), "--to", "coco"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_several_labels_of_an_image_are_counted_each(tmp_path, capsys):
    root = tmp_path / "data"
    for name in "abc":
        write(root / f"{name}.png")
    write(root / "train.csv", "path,label\na.png,cat|dog\nb.png,cat\nc.png,\n")
    assert main(["data", "check", str(root), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "classes in the format csv, 2 classes" in said
    assert "images have several labels, or none: train with data.multi_label=True loss.label_smoothing=0" in said
    assert "train: 3 images, 3 labels" in said
    assert "2 cat" in said
    assert "1 dog" in said
    assert (tmp_path / "out" / "samples.png").is_file()


def six_channels(path, size=(30, 40)):
    """A TIFF of six channels, the first of which is red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*size, 6), np.uint8)
    pixels[..., 0] = 255
    write_tiled(path, *size, 16, pixels, channels=6)


def spectral_objects(root):
    yolo(root)
    for file in list(root.rglob("*.png")):
        file.unlink()
        six_channels(file.with_suffix(".tif"))


def spectral_maps(root):
    masks(root)
    for file in list(root.rglob("images/**/*.png")):
        file.unlink()
        six_channels(file.with_suffix(".tif"))


def spectral_classes(root):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            six_channels(root / split / name / "a.tif")


@pytest.mark.parametrize("lay", [spectral_objects, spectral_maps, spectral_classes])
def test_of_many_channels_the_first_three_are_drawn(lay, tmp_path, capsys):
    lay(tmp_path / "data")
    assert main(["data", "check", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "images have 6 channels: train with data.channels=6; drawn are the first three" in said
    pixels = np.asarray(Image.open(tmp_path / "out" / "samples.png").convert("RGB")).astype(int)
    # Of label maps little is left between the outlines.
    assert ((pixels[..., 0] > 150) & (pixels[..., 1:].max(-1) < 100)).mean() > 0.001
