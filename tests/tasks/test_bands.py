"""Images of more than three channels and of 16 bits: read, trained on, evaluated and predicted alike."""

import json

import numpy as np
import pytest
import timm
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.data.bands import upright
from foveate.tasks.data.images import (
    Bands,
    DamagedImageError,
    choose_white,
    read_image,
    read_size,
    to_bytes,
    to_pixels,
)
from foveate.tasks.data.statistics import measure_normalization
from foveate.tasks.data.windows import Windows
from foveate.tasks.load import load
from foveate.tasks.segment import Task as Segment
from foveate.tools.cli import main
from PIL import ExifTags, Image, ImageOps

from .test_tiles import write_tiled

CHANNELS, WHITE = 5, 4095


def scene(seed, side=64):
    """Return 12-bit values [side, side, 5], and a square of [side, side] that only the last channel shows."""
    draw = np.random.default_rng(seed)
    values = draw.integers(300, 900, (side, side, CHANNELS)).astype(np.uint16)
    square = np.zeros((side, side), np.uint8)
    top, left = draw.integers(4, side // 2 - 4, 2)
    square[top : top + side // 3, left : left + side // 3] = 1
    values[..., 4] += square.astype(np.uint16) * 3000
    return values, square


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tiled(path, *values.shape[:2], 32, values, depth=2, channels=values.shape[2], predictor=2)
    return path


def test_channels_are_read_as_they_are(tmp_path):
    values, _ = scene(0)
    path = save(tmp_path / "a.tif", values)
    image = read_image(path, CHANNELS, WHITE)
    assert (np.asarray(image) == to_bytes(values, WHITE)).all()
    assert (image.size, read_size(path)) == ((64, 64), ((64, 64), False))
    assert choose_white([path]) == WHITE
    assert (np.asarray(Windows(path, CHANNELS, WHITE).read(3, 9, 40, 64)) == to_bytes(values, WHITE)[9:64, 3:40]).all()
    assert np.asarray(image.convert("RGB")).shape == (64, 64, 3)
    with pytest.raises(DamagedImageError, match=r"a\.tif: has 5 channels, not 4; data\.channels says how many"):
        read_image(path, 4)
    with pytest.raises(DamagedImageError, match=r"a\.tif: has 5 channels; data\.channels=5 reads them"):
        read_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_turned_as_pictures_are(orientation):
    values = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    picture = Image.fromarray(values)
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    assert (upright(values, orientation) == np.asarray(ImageOps.exif_transpose(picture))).all()


def test_four_channels_may_be_of_a_png(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (9, 8, 4), np.uint8)
    Image.fromarray(values, "RGBA").save(tmp_path / "a.png")
    assert (np.asarray(read_image(tmp_path / "a.png", 4)) == values).all()
    assert np.asarray(read_image(tmp_path / "a.png", 3)).shape == (9, 8, 3)
    assert (np.asarray(to_pixels(values.astype(np.uint16) * 257, 4)) == values).all()
    with pytest.raises(DamagedImageError, match="the image: has 4 channels, not 5"):
        to_pixels(values, 5)


def test_mean_and_std_are_those_of_the_pixels():
    images = [Bands(np.random.default_rng(seed).integers(0, 256, (7, 5 + seed, 6), np.uint8)) for seed in range(3)]
    pixels = np.concatenate([image.pixels.reshape(-1, 6) for image in images]) / 255
    measured = measure_normalization(images.__getitem__, 3)
    assert measured["mean"] == pytest.approx(pixels.mean(0), abs=1e-6)
    assert measured["std"] == pytest.approx(pixels.std(0), abs=1e-6)


def test_a_first_convolution_is_adapted_as_timm_does(tmp_path):
    rgb = timm.create_model("nat_atto", num_classes=3)
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    from foveate.tasks.classify.task import create_classifier
    from foveate.tasks.data.classification import InputRule

    rule = InputRule(32, CHANNELS, (0.5,) * CHANNELS, (0.2,) * CHANNELS)
    model = create_classifier("nat_atto", 3, rule, checkpoint=tmp_path / "rgb.pth")
    key = next(iter(rgb.state_dict()))
    old, new = rgb.state_dict()[key], model.state_dict()[key]
    repeated = torch.cat([old, old], 1)[:, :CHANNELS] * (3 / CHANNELS)
    assert torch.allclose(new, repeated, atol=1e-7)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 8), ("val", 4)):
        for seed in range(count):
            for name in ("empty", "square"):
                values, square = scene(seed + 100 * (split == "val"), 40)
                values[..., 4] -= square.astype(np.uint16) * 3000 if name == "empty" else np.uint16(0)
                save(root / split / name / f"{seed}.tif", values)
    return root


@pytest.mark.heavy
def test_a_classifier_learns_from_the_last_channel(classes, tmp_path, capsys, refused_here):
    recipe = ["classify/finetune", "model.name=nat_atto", f"data.root={classes}", "data.size=32", "epochs=6"]
    recipe += ["model.pretrained=False", "batch_size=8", "optimizer.lr=2e-3", "workers=0"]
    recipe += ["data.augment.auto_augment=None"]
    message = refused_here("train", *recipe, "--output", str(tmp_path / "a"))
    assert "has 5 channels; data.channels=5 reads them" in message
    run = tmp_path / "run"
    assert main(["train", *recipe, f"data.channels={CHANNELS}", "--output", str(run)]) == 0
    assert "of the channels, measured on the training images" in capsys.readouterr().out
    best = max(entry["val/accuracy"] for entry in json.loads((run / "history.json").read_text()))
    assert best >= 0.8
    assert main(["eval", str(run / "config.py"), str(run / "best.pth"), "--output", str(tmp_path / "eval")]) == 0
    model = load(run / "best.pth", "cpu")
    paths = sorted(classes.glob("val/*/*.tif"))
    results = model.predict(paths, top=1)
    right = [result["classes"][0]["class"] == path.parent.name for result, path in zip(results, paths, strict=True)]
    assert sum(right) / 8 == best
    (of_array,) = model.predict(scene(100, 40)[0], top=1)
    assert dict(of_array) == dict(model.predict(classes / "val" / "square" / "0.tif", top=1)[0])
    assert of_array.plot().mode == "RGB"
    Image.new("RGB", (40, 40)).save(tmp_path / "rgb.png")
    with pytest.raises(TaskError, match=r"rgb\.png: has 3 channels, not 5"):
        model.predict(tmp_path / "rgb.png")


def test_colours_are_not_distorted_where_there_are_none(classes, refused_here, tmp_path):
    recipe = ["classify/finetune", "model.name=nat_atto", f"data.root={classes}", "model.pretrained=False"]
    recipe += [f"data.channels={CHANNELS}", "--output", str(tmp_path / "a")]
    message = refused_here("train", *recipe, "data.augment.auto_augment=rand-m9")
    assert "data.augment.auto_augment is for grey and colours, not for 5 channels" in message


@pytest.fixture
def refused_here(capsys):
    def run(*argv):
        capsys.readouterr()
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return run


def mask_folder(root):
    for split, count in (("train", 6), ("val", 2)):
        for seed in range(count):
            values, square = scene(seed + 100 * (split == "val"))
            save(root / "images" / split / f"{seed}.tif", values)
            (root / "masks" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(square).save(root / "masks" / split / f"{seed}.png")
    (root / "classes.txt").write_text("ground\nsquare\n")
    return root


def test_dense_models_take_the_channels_of_the_data(tmp_path):
    overrides = [f"data.root={mask_folder(tmp_path)}", "model.backbone=test_resnet", f"data.channels={CHANNELS}"]
    overrides += ["model.pretrained=False", "data.augment.crop=64", "model.kwargs.channels=16"]
    task = Segment(engine.load_config("segment/finetune", overrides))
    said = task.check_data()[1]
    assert said.startswith("mean 0.")
    assert said.endswith("of the channels, measured on the training images")
    assert len(task.rule.mean) == len(task.card()["input"]["std"]) == CHANNELS
    image, _ = task.train_set[0]
    assert image.shape == (CHANNELS, 64, 64)
    assert abs(task.val_set[0][0]["image"].mean(dim=(1, 2))).max() < 1
    model = task.build_model()
    assert next(model.backbone.parameters()).shape[1] == CHANNELS
    assert torch.isfinite(sum(task.loss(model.train(), *task.train_set.collate([task.train_set[0]] * 2)).values()))
    with pytest.raises(TaskError, match=r"data\.augment\.distortion is for colours, not for 5 channels"):
        Segment(engine.load_config("segment/finetune", [*overrides, "data.augment.distortion=True"]))
    with pytest.raises(TaskError, match=r"data\.mean and data\.std need a number each for every channel"):
        Segment(engine.load_config("segment/finetune", [*overrides, "data.mean=(0.1,0.2)", "data.normalization=None"]))


@pytest.mark.heavy
def test_a_segmenter_learns_from_the_last_channel(tmp_path, capsys):
    root = mask_folder(tmp_path / "maps")
    recipe = ["segment/finetune", "model.backbone=test_resnet", f"data.root={root}", f"data.channels={CHANNELS}"]
    recipe += ["model.pretrained=False", "data.augment.crop=64", "batch_size=2", "iterations=90", "workers=0"]
    recipe += ["model.kwargs.channels=16", "data.repeat=15", "data.short=64", "model.head=semantic_fpn"]
    recipe += ["data.augment.shorts=(64,)", "data.augment.ratio=None"]
    run = tmp_path / "run"
    assert main(["train", *recipe, "optimizer.lr=3e-3", "--output", str(run)]) == 0
    assert "of the channels, measured on the training images" in capsys.readouterr().out
    assert json.loads((run / "history.json").read_text())[-1]["val/miou"] > 0.7
    argv = ["predict", str(root / "images" / "val"), "--checkpoint", str(run / "best.pth")]
    for tiles in ([], ["--tile", "48", "--overlap", "16"]):
        output = tmp_path / f"out{len(tiles)}"
        assert main([*argv, "--output", str(output), *tiles]) == 0
        labels = np.asarray(Image.open(output / "0_labels.png"))
        truth = np.asarray(Image.open(root / "masks" / "val" / "0.png"))
        assert (labels == truth).mean() > 0.8


@pytest.mark.heavy
def test_a_detector_learns_from_the_last_channel(tmp_path, capsys):
    root = tmp_path / "objects"
    for split, count in (("train", 8), ("val", 2)):
        images, annotations = [], []
        for seed in range(count):
            values, square = scene(seed + 100 * (split == "val"))
            save(root / split / f"{seed}.tif", values)
            rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
            box = [int(columns[0]), int(rows[0]), len(columns), len(rows)]
            images.append({"id": seed, "file_name": f"{seed}.tif", "height": 64, "width": 64})
            annotations.append({"id": seed, "image_id": seed, "category_id": 1, "bbox": box, "iscrowd": 0})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
        (root / f"{split}.json").write_text(json.dumps(content))
    recipe = ["detect/finetune", "model.backbone=test_resnet", "data.name=coco", f"data.root={root}"]
    for split in ("train", "val"):
        recipe += [f"data.{split}.annotations={split}.json", f"data.{split}.images={split}"]
    recipe += [f"data.channels={CHANNELS}", "model.pretrained=False", "batch_size=2", "iterations=200"]
    recipe += ["workers=0", "optimizer.lr=1e-3", "model.head=retinanet"]
    recipe += [f"model.kwargs.{name}={value}" for name, value in (("channels", 16), ("min_size", 64), ("max_size", 64))]
    recipe += ["data.augment.shorts=None"]
    run = tmp_path / "run"
    assert main(["train", *recipe, "--output", str(run)]) == 0
    assert json.loads((run / "history.json").read_text())[-1]["val/box_ap50"] > 0.5
    found = load(run / "best.pth", "cpu").predict(root / "val" / "0.tif", threshold=0.3)
    assert len(found[0]["objects"]) >= 1
