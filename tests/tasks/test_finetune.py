"""Data of one's own is trained on without a recipe of its own: recognised, split, normalised as the backbone was."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from foveate.tasks import TaskError, engine
from foveate.tasks.classify import Task as Classify
from foveate.tasks.data.formats import hold_out, recognise
from foveate.tasks.data.segmentation import LabelMaps
from foveate.tasks.detect import Task as Detect
from foveate.tasks.segment import Task as Segment
from PIL import Image

TASKS = {"classify": Classify, "detect": Detect, "segment": Segment}


def picture(path, size=(40, 60), maps=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(len(path.name))
    Image.fromarray(draw.integers(0, 2 if maps else 256, size if maps else (*size, 3), np.uint8)).save(path)


def yolo(root, line="0 0.5 0.5 0.5 0.5", splits=("train",)):
    for split in splits:
        for index in range(5):
            picture(root / "images" / split / f"{index}.png")
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            (root / "labels" / split / f"{index}.txt").write_text(line)
    (root / "data.yaml").write_text("".join(f"{split}: images/{split}\n" for split in splits) + "names: [cell]\n")


def masks(root):
    for split in ("train", "val"):
        for index in range(2):
            picture(root / "images" / split / f"{index}.png")
            picture(root / "masks" / split / f"{index}.png", maps=True)
    (root / "classes.txt").write_text("ground\ntree\n")


def task_of(recipe, root, *overrides):
    config = engine.load_config(recipe, [f"data.root={root}", *overrides])
    return config, TASKS[config["task"]](config)


SMALL = (
    "model.pretrained=False",
    "batch_size=2",
    "workers=0",
    "iterations=3",
)


def test_a_detector_is_trained_on_a_folder_without_held_out_images(tmp_path):
    yolo(tmp_path / "data")
    small = [f"model.kwargs.{name}={value}" for name, value in (("channels", 16), ("hidden", 16), ("min_size", 64))]
    overrides = (*SMALL, "model.backbone=nat_atto", "data.augment.shorts=(64,)", "data.augment.long=64", *small)
    config, task = task_of("detect/finetune", tmp_path / "data", *overrides)
    assert (len(task.train_set), len(task.val_set), task.model["head"]) == (4, 1, "faster_rcnn")
    result = engine.train(config, tmp_path / "run", progress=False)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "holds objects in the format yolo; no held-out images: 20% of the training images are, drawn by" in log
    assert "drawn by data.holdout_seed=0" in log
    assert "  classes: cell\n" in log
    assert "objects without masks: faster_rcnn" in log
    # Two batches an epoch: the second ends after one.
    assert [entry["epoch"] for entry in result["history"]] == [1, 2]
    assert json.loads((tmp_path / "run" / "history.json").read_text())


def test_a_segmenter_takes_masks_and_polygons(tmp_path):
    masks(tmp_path / "masks")
    yolo(tmp_path / "yolo", "0 0.2 0.2 0.8 0.2 0.8 0.8 0.2 0.8", ("train", "val"))
    overrides = ("model.backbone=nat_atto", "data.augment.crop=64", *SMALL)
    _, by_maps = task_of("segment/finetune", tmp_path / "masks", *overrides)
    assert by_maps.classes == ["ground", "tree"]
    _, task = task_of("segment/finetune", tmp_path / "yolo", *overrides)
    assert (task.classes, task.things) == (["background", "cell"], [False, True])
    labels = task.val_set[0][1].numpy()
    assert (labels[8:32, 12:48] == 1).all()
    assert labels.sum() == 24 * 36
    told, truths = task.val_set.segments(0)[:2], task.val_set.labels(0)
    assert [np.array_equal(mask, truths == label) for mask, label in zip(*told, strict=True)] == [True, True]
    assert len(task.check_data()) == 1


def test_label_maps_are_read_once_where_some_are_held_out(tmp_path, monkeypatch):
    for index in range(5):
        picture(tmp_path / "images" / "train" / f"{index}.png")
        picture(tmp_path / "masks" / "train" / f"{index}.png", maps=True)
    (tmp_path / "classes.txt").write_text("ground\ntree\n")
    looked = []
    look = LabelMaps._look_at
    monkeypatch.setattr(LabelMaps, "_look_at", lambda self, index: (looked.append(index), look(self, index))[1])
    _, task = task_of("segment/finetune", tmp_path, "model.backbone=nat_atto", "data.augment.crop=32", *SMALL)
    assert sorted(looked) == [0, 1, 2, 3, 4]
    assert (task.train_set.images, task.val_set.images) == (4, 1)
    assert not {*task.train_set.files} & {*task.val_set.files}
    assert task.train_set[0][0].shape == (3, 32, 32)
    assert task.val_set[0][1].shape == (40, 60)


def test_classes_in_folders_alone_are_split_evenly(tmp_path):
    for name, count in (("cat", 10), ("dog", 3)):
        for index in range(count):
            picture(tmp_path / name / f"{index}.png")
    _, task = task_of("classify/finetune", tmp_path, "model.name=nat_atto", "model.pretrained=False")
    assert task.classes == ["cat", "dog"]
    assert [task.val_set.targets.count(label) for label in (0, 1)] == [2, 1]
    assert len(task.train_set) == 10
    assert not {path for path, _ in task.train_set.samples} & {path for path, _ in task.val_set.samples}
    _, other = task_of("classify/finetune", tmp_path, "model.name=nat_atto", "data.holdout_seed=5")
    assert task.val_set.samples != other.val_set.samples


def test_images_are_normalised_as_the_backbone_s_weights_were_trained(tmp_path):
    yolo(tmp_path, splits=("train", "val"))
    expected = timm.get_pretrained_cfg("vit_tiny_patch16_224").mean
    _, task = task_of("detect/finetune", tmp_path, "model.backbone=vit_tiny_patch16_224", "model.pretrained=False")
    assert task.model["kwargs"]["mean"] == expected == (0.5, 0.5, 0.5)
    _, task = task_of("detect/finetune", tmp_path, "model.backbone=nat_tiny", "model.kwargs.mean=(0.1,0.1,0.1)")
    assert task.model["kwargs"]["mean"] == (0.1, 0.1, 0.1)
    with pytest.raises(TaskError, match=r"data.normalization is 'imagenet', but must be backbone"):
        task_of("detect/finetune", tmp_path, "data.normalization=imagenet")


def test_what_is_held_out_is_drawn_once_and_never_everything():
    data = {"holdout": 0.2, "holdout_seed": 0, "root": "x"}
    train, val = hold_out(10, data)
    assert sorted(train + val) == list(range(10))
    assert (len(val), hold_out(10, data)) == (2, (train, val))
    assert hold_out(2, data | {"holdout": 0.9})[1] != [0, 1]
    with pytest.raises(TaskError, match="too few images"):
        hold_out(1, data)


def test_what_a_folder_is_not_is_said(tmp_path):
    with pytest.raises(TaskError, match=r"is in none of the formats of objects, coco, huggingface, voc, yolo; name"):
        task_of("detect/finetune", tmp_path)
    masks(tmp_path)
    with pytest.raises(TaskError, match=r"is in none of the formats of objects, .*; it holds maps"):
        task_of("detect/finetune", tmp_path)
    yolo(tmp_path / "yolo")
    with pytest.raises(TaskError, match=r"data.holdout is 1.5"):
        task_of("detect/finetune", tmp_path / "yolo", "data.holdout=1.5")


def coco(root):
    for split in ("train", "val"):
        picture(root / "images" / split / f"{split}.png")
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20]}
        content = {"images": [{"id": 1, "file_name": f"{split}.png", "height": 40, "width": 60}], "annotations": [box]}
        (root / "annotations").mkdir(exist_ok=True)
        file = root / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cell"}]}))


@pytest.mark.parametrize("spoiled", ["gone", b"", b'{"images": [', b"<html>\n", "a folder"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_no_split_of_coco_s_is_taken_for_one_that_is_damaged(split, spoiled, tmp_path):
    coco(tmp_path)
    file = tmp_path / "annotations" / f"instances_{split}.json"
    assert {part["annotations"][-10:-5] for part in recognise(tmp_path, "objects")[1].values()} == {"train", "s_val"}
    file.unlink()
    if spoiled == "a folder":
        file.mkdir()
    elif spoiled != "gone":
        file.write_bytes(spoiled)
    if split == "val" and isinstance(spoiled, str):
        assert recognise(tmp_path, "objects")[1]["val"] is None
        return
    message = "is named as held-out images" if isinstance(spoiled, str) else f"instances_{split}.json: is cut off"
    with pytest.raises(TaskError, match=message):
        task_of("detect/finetune", tmp_path)


@pytest.mark.parametrize("name", ["result.json", "train/_annotations.coco.json", "annotations/instances_default.json"])
@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [("", "is cut off"), ('{"images": [', "is cut off"), ("[]", "has no images, annotations, cat")],
)
def test_a_damaged_export_is_no_other_format(name, spoiled, reason, tmp_path):
    """Its folder of images would be taken for a class, or the set to validate by for all there is."""
    coco(tmp_path)
    shutil.rmtree(tmp_path / "annotations")
    for folder in ("images", "valid"):
        picture(tmp_path / folder / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(spoiled)
    with pytest.raises(TaskError, match=rf"{name}: {reason}"):
        recognise(tmp_path, "objects")


def test_rare_classes_of_pixels_weigh_more(tmp_path):
    masks(tmp_path)
    for split in ("train", "val"):
        for index in range(2):
            labels = np.zeros((40, 60), np.uint8)
            labels[:10, :12] = 1
            Image.fromarray(labels).save(tmp_path / "masks" / split / f"{index}.png")
    overrides = ("model.backbone=test_resnet", "data.augment.crop=64", "model.head=semantic_fpn", *SMALL)
    _, task = task_of("segment/finetune", tmp_path, *overrides, "loss.class_weights=balanced")
    expected = torch.tensor([2400 / (2 * 2280), 2400 / (2 * 120)])
    assert torch.allclose(task.class_weights, expected)
    batch = task.train_set.collate([task.train_set[0], task.train_set[1]])
    model = task.build_model().eval()
    assert "class_weights" not in model.state_dict()
    weighed = model.loss(*batch, normalized=True)["decode.loss_ce"]
    logits = F.interpolate(model.head(model.features(batch[0])), batch[1].shape[-2:], mode="bilinear")
    each = F.cross_entropy(logits, batch[1], ignore_index=255, reduction="none")
    weights = torch.where(batch[1] == 255, 0, expected[batch[1].clamp(max=1)])
    assert torch.allclose(weighed, (each * weights).mean(), atol=1e-5)
    with pytest.raises(TaskError, match=r"loss\.class_weights is for heads that label pixels; mask2former finds masks"):
        task_of("segment/finetune", tmp_path, *overrides, "loss.class_weights=balanced", "model.head=mask2former")
    with pytest.raises(TaskError, match="must be balanced or 2 numbers, one for each class"):
        task_of("segment/finetune", tmp_path, *overrides, "loss.class_weights=(1.0,)")
