"""Tables of `datasets`: images with labels and with objects, from a folder of parquet or of save_to_disk."""

import io

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.classify import Task as Classify
from foveate.tasks.data.coco import read_picture
from foveate.tasks.data.huggingface import find_objects
from foveate.tasks.data.images import DamagedImageError
from foveate.tasks.detect import Task as Detect
from foveate.tasks.segment import Task as Segment
from foveate.tools.cli import main
from PIL import Image

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value, size=(30, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def labelled(values, labels, names=("cat", "dog")):
    feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    return datasets.Dataset.from_dict({"image": list(map(png, values)), "label": labels}, features=features)


@pytest.fixture
def table(tmp_path):
    parts = {"train": labelled(range(10, 60, 10), [0, 1, 1, 0, 1]), "validation": labelled([70, 80], [1, 0])}
    for split, part in parts.items():
        part.to_parquet(tmp_path / "parquet" / "data" / f"{split}-00000-of-00001.parquet")
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return tmp_path


def task_of(root, *overrides):
    options = (f"data.root={root}", "model.name=nat_atto", "model.pretrained=False", *overrides)
    return Classify(engine.load_config("classify/finetune", options))


def test_held_out_rows_alone_are_not_trained_on(table):
    (table / "parquet" / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(TaskError, match=r"no split to train on, only validation; name one .* data.train=validation"):
        task_of(table / "parquet")


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_labels_come_with_their_names(table, form, capsys):
    task = task_of(table / form, "data.size=32")
    assert task.classes == ["cat", "dog"]
    assert (task.train_set.targets, task.val_set.targets) == ([0, 1, 1, 0, 1], [1, 0])
    assert [np.asarray(task.train_set.image(index))[0, 0].tolist() for index in (0, 4)] == [[10, 0, 0], [50, 0, 0]]
    image, label = task.val_set[0]
    assert (image.shape, label) == (torch.Size([3, 32, 32]), 1)
    assert main(["data", "check", str(table / form)]) == 0
    assert "huggingface" in (text := capsys.readouterr().out)
    assert "cat" in text


def test_a_split_is_named_or_held_out(table):
    task = task_of(table / "saved", "data.name=huggingface", "data.train=validation", "data.val=train")
    assert (len(task.train_set), len(task.val_set)) == (2, 5)
    labelled(range(10), [0, 1] * 5, names=None).save_to_disk(table / "alone")
    task = task_of(table / "alone")
    assert task.classes == ["0", "1"]
    assert (len(task.train_set), len(task.val_set)) == (8, 2)
    assert not {name for name, _ in task.train_set.samples} & {name for name, _ in task.val_set.samples}


def test_labels_without_names_are_numbered_and_matched(table):
    feature = datasets.Value("string")
    parts = {
        "train": labelled(range(3), [10, 9, -1], None).cast_column("label", feature),
        "validation": labelled(range(2), [9, 11], None).cast_column("label", feature),
    }
    datasets.DatasetDict(parts).save_to_disk(table / "text")
    with pytest.raises(TaskError, match=r"text, validation, row 1: there is no class '11'; known: -1, 10, 9"):
        task_of(table / "text")
    parts["validation"] = parts["train"]
    datasets.DatasetDict(parts).save_to_disk(table / "known")
    task = task_of(table / "known")
    assert (task.classes, task.val_set.targets) == (["-1", "9", "10"], [2, 1, 0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=trian"], r"has no split 'trian'; it has train, validation"),
        (["data.label_column=lable"], r"has no column 'lable'; did you mean 'label'.* name it by data.label_column"),
        (["data.val=test"], r"has no split 'test'"),
        (["data.multi_label=True"], r"data.multi_label: of huggingface an image has one label"),
    ],
)
def test_what_isn_t_there_is_said(table, overrides, message):
    with pytest.raises(TaskError, match=message):
        task_of(table / "saved", "data.name=huggingface", *overrides)


def test_what_is_broken_is_said(table):
    (table / "broken").mkdir()
    (table / "broken" / "train.parquet").write_bytes(b"no table")
    with pytest.raises(TaskError, match=r"broken: `datasets` can't read it") as caught:
        task_of(table / "broken")
    assert "\n" not in str(caught.value)
    part = labelled([1, 2], [0, 1]).cast_column("image", datasets.Image(decode=False))
    part = part.map(lambda row, index: {"image": {"bytes": b"no image"} if index else row["image"]}, with_indices=True)
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(table / "images")
    task = task_of(table / "images", "data.name=huggingface")
    with pytest.raises(DamagedImageError, match=r"images, train/1: not an image, or damaged"):
        task.train_set[1]


@pytest.mark.parametrize(("kind", "label"), [("int64", None), ("string", ""), ("list", [1, 2])])
def test_a_row_without_a_label_is_named(kind, label, tmp_path):
    part = {"image": list(map(png, (10, 20))), "label": [label, {"int64": 1, "string": "cat"}.get(kind, [1])]}
    value = datasets.Sequence(datasets.Value("int64")) if kind == "list" else datasets.Value(kind)
    features = datasets.Features({"image": datasets.Image(), "label": value})
    datasets.Dataset.from_dict(part, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(TaskError, match=r"saved, train, row 0: label is .*, which is no class; correct it, or filter"):
        task_of(tmp_path / "saved")


NAMES = ["<script>alert(1)</script>", "a $x_1$ $\\frac{", "b\x1b[31m\x1b[2J", "two\nlines\r\tand more", "n" * 300]


def test_names_of_classes_reach_pictures_reports_and_the_terminal_as_text(tmp_path, capsys):
    parts = {name: labelled(range(10, 60, 10), range(5), NAMES) for name in ("train", "validation")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert main(["data", "check", str(tmp_path / "saved"), "--output", str(tmp_path / "check")]) == 0
    checked = capsys.readouterr().out
    settings = (
        "model.name=nat_atto",
        "model.pretrained=False",
        "data.size=32",
        "epochs=1",
        "batch_size=5",
        "workers=0",
    )
    run = tmp_path / "run"
    argv = ["train", "classify/finetune", f"data.root={tmp_path / 'saved'}", "schedule.warmup_epochs=0", *settings]
    assert main([*argv, "--output", str(run)]) == 0
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    argv = [
        "predict",
        str(tmp_path / "a.png"),
        "--checkpoint",
        str(run / "best.pth"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    printed = checked + capsys.readouterr().out
    for text in (printed, (run / "log.txt").read_text(), report := (run / "report.html").read_text()):
        assert "\x1b" not in text
        assert "\r" not in text
    assert "two\\nlines\\r\\tand more" in checked
    assert "<script" not in report
    assert "&lt;script&gt;alert(1)" in report
    assert all("\x1b" not in path.name and "<" not in path.name for path in run.iterdir())


def objects(kind):
    category = datasets.ClassLabel(names=["cell", "dust"])
    entry = {"bbox": datasets.Sequence(datasets.Value("float32"), 4), "category": category}
    cells = [
        {"bbox": [[2, 3, 10, 8], [15, 5, 6, 6]], "category": [0, 1]},
        {"bbox": [], "category": []},
        {"bbox": [[0, 0, 30, 20]], "category": [1]},
    ]
    if kind == "list":
        feature = [entry]
        cells = [
            [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)] for cell in cells
        ]
    else:
        feature = {key: datasets.Sequence(value) for key, value in entry.items()}
    features = datasets.Features({"image": datasets.Image(), "objects": feature})
    return datasets.Dataset.from_dict({"image": list(map(png, (10, 20, 30))), "objects": cells}, features=features)


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_objects_are_read_as_coco_s(kind, tmp_path):
    datasets.DatasetDict({"train": objects(kind), "test": objects(kind)}).save_to_disk(tmp_path / "cells")
    options = (f"data.root={tmp_path / 'cells'}", "model.backbone=nat_atto", "model.pretrained=False")
    task = Detect(engine.load_config("detect/finetune", options))
    assert (task.classes, task.model["head"]) == (["cell", "dust"], "faster_rcnn")
    assert (len(task.train_set), len(task.val_set)) == (3, 3)
    image, target = task.val_set[0]
    assert image.shape == (3, 20, 30)
    assert target["boxes"].tolist() == [[2, 3, 12, 11], [15, 5, 21, 11]]
    assert target["labels"].tolist() == [0, 1]
    assert len(task.val_set[1][1]["labels"]) == 0
    assert task.check_data()[0].endswith("cells holds objects in the format huggingface")


CELL = {"bbox": [[2, 3, 10, 8]], "category": [0]}


@pytest.mark.parametrize("names", [["cell", "dust"], None])
@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (None, r"train/0: objects needs lists of equally many bbox and category, or empty ones"),
        ({"bbox": None}, r"train/0: objects needs lists"),
        ({"category": [0, 1]}, r"train/0: objects needs lists"),
        ({"bbox": [[2, 3, 10, 8]] * 2}, r"train/0: objects needs lists"),
        ({"category": [None]}, r"1 unknown category \(\S*, train/0, object 0: None\)"),
        ({"bbox": [None]}, r"box that isn't four numbers .*train/0, object 0"),
    ],
)
def test_a_row_of_broken_objects_is_one_line(names, spoilt, message, tmp_path):
    category = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    entry = {"bbox": datasets.Sequence(datasets.Value("float32")), "category": category}
    features = datasets.Features(
        {"image": datasets.Image(), "objects": {key: datasets.Sequence(value) for key, value in entry.items()}}
    )
    cells = [None if spoilt is None else CELL | spoilt, CELL]
    part = datasets.Dataset.from_dict({"image": list(map(png, (10, 20))), "objects": cells}, features=features)
    datasets.DatasetDict({"train": part}).save_to_disk(tmp_path / "cells")
    data = Detect.DEFAULTS["data"] | {"train": {"split": "train"}}
    with pytest.raises(TaskError, match=message) as caught:
        find_objects(tmp_path / "cells", data, "train", None, False)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=message):
        records, classes = find_objects(tmp_path / "cells", data | {"broken": "drop"}, "train", None, False)
    assert records[-1].instances.labels.tolist() == [0]
    assert classes == (names or ["0"])


def test_a_damaged_image_of_objects_is_left_to_the_loader_that_counts_it(tmp_path):
    part = objects("dict").cast_column("image", datasets.Image(decode=False))
    part = part.map(lambda row, index: {"image": {"bytes": b"none"} if index == 0 else row["image"]}, with_indices=True)
    datasets.DatasetDict({"train": part}).save_to_disk(tmp_path / "cells")
    data = Detect.DEFAULTS["data"] | {"train": {"split": "train"}}
    with pytest.raises(TaskError, match=r"1 damaged file \(\S*cells, train/0: not an image"):
        find_objects(tmp_path / "cells", data, "train", None, False)
    records, _ = find_objects(tmp_path / "cells", data, "train", None, True)
    assert [len(record.instances) for record in records] == [0, 0, 1]
    with pytest.raises(DamagedImageError, match="cells, train/0"):
        read_picture(records[0])


def mapped(values, masks):
    """Return a table of images of a value, and of label maps, arrays or bytes, beside them."""

    def encoded(mask):
        if not isinstance(mask, np.ndarray):
            return mask and {"bytes": mask, "path": None}
        file = io.BytesIO()
        Image.fromarray(mask).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return datasets.Dataset.from_dict(
        {"image": list(map(png, values)), "mask": list(map(encoded, masks))}, features=features
    )


def halves(seed=0, most=2):
    return np.random.default_rng(seed).integers(0, most, (20, 30), np.uint8)


def segment_task(root, *overrides):
    options = (f"data.root={root}", "model.backbone=test_resnet", "model.pretrained=False", "data.augment.crop=32")
    return Segment(engine.load_config("segment/finetune", (*options, *overrides)))


def test_label_maps_are_read(tmp_path, capsys):
    parts = {"train": mapped(range(10, 50, 10), map(halves, range(4))), "validation": mapped([70], [halves(9)])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "classes.txt").write_text("ground\ntree\n")
    task = segment_task(tmp_path / "saved")
    assert task.check_data()[0].endswith("holds maps in the format huggingface")
    assert (task.classes, task.train_set.images, task.val_set.images) == (["ground", "tree"], 4, 1)
    inputs, truth = task.val_set[0]
    assert (truth.numpy() == halves(9)).all()
    assert inputs["size"] == (20, 30)
    assert np.asarray(task.train_set.image(2))[0, 0].tolist() == [30, 0, 0]
    image, labels = task.train_set[0]
    assert (image.shape, labels.shape) == (torch.Size([3, 32, 32]), torch.Size([32, 32]))
    assert main(["data", "check", str(tmp_path / "saved"), "--output", str(tmp_path / "out")]) == 0
    assert "maps in the format huggingface, 2 classes" in capsys.readouterr().out
    named = segment_task(tmp_path / "saved", "data.name=huggingface", "data.val.split=validation")
    assert (named.val_set[0][1] == truth).all()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([halves(), halves(most=4)], r"1 has values that stand for no class: 2, 3"),
        ([halves(), halves()[:10]], r"1 has 10x30 pixels, but its image 20x30"),
        ([halves(), b"no picture"], r"train/1, mask: not an image, or damaged"),
        ([halves(), None], r"train/1, mask: holds no image"),
        ([halves(), np.zeros((20, 30, 3), np.uint8)], r"is a picture of 3 channels; a label map has one"),
    ],
)
def test_a_broken_label_map_is_one_line(masks, message, tmp_path):
    mapped([10, 20], masks).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "classes.txt").write_text("ground\ntree\n")
    with pytest.raises(TaskError, match=message) as caught:
        segment_task(tmp_path / "saved")
    assert "\n" not in str(caught.value)
