import json

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.augment import IGNORE
from foveate.tasks.segment import Task
from foveate.tasks.segment.data import ADE20K_CLASSES, InputRule, build_datasets
from PIL import Image

DATA = Task.DEFAULTS["data"]
RULE = InputRule(None, 1, 1, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def labels_of(values, size=(21, 34)):
    """A label map in which every value has a column of its own, as wide as the others."""
    return np.array(values, np.uint8)[np.arange(size[1]) * len(values) // size[1]][None].repeat(size[0], 0)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for index in range(2):
            write(tmp_path / "images" / split / f"{index}.jpg", np.zeros((21, 34, 3)))
            write(tmp_path / "masks" / split / f"{index}.png", labels_of([0, 1, 255, 2]))
    (tmp_path / "classes.txt").write_text("sky\ntree\nroad\n")
    return tmp_path, DATA | {"name": "folder", "root": str(tmp_path), "augment": {"crop": (32, 40), "flip": 0.0}}


def test_a_plain_folder_is_read_padded_and_measured(folder):
    train, val = build_datasets(folder[1], RULE)
    assert (len(train), train.classes) == (2, ["sky", "tree", "road"])
    image, labels = train[0]
    assert image.shape == (3, 32, 40)
    assert labels.shape == (32, 40)
    assert torch.equal(labels[:21, :34], torch.from_numpy(labels_of([0, 1, IGNORE, 2]).astype(np.int64)))
    assert (labels[21:] == IGNORE).all()
    assert image[:, 25].eq(0).all()
    assert image[:, 0, 0].tolist() == pytest.approx([-2.5, -2.0, -1.5])
    inputs, truth = val[1]
    assert inputs["size"] == (21, 34)
    assert inputs["image"].shape == (3, 21, 34)
    assert truth.unique().tolist() == [0, 1, 2, IGNORE]
    batch, maps = train.collate([train[0], train[1]])
    assert batch.shape == (2, 3, 32, 40)
    assert maps.shape == (2, 32, 40)


def test_values_of_masks_may_be_named(folder):
    root, data = folder
    for split in ("train", "val"):
        for index in range(2):
            write(root / "masks" / split / f"{index}.png", labels_of([0, 255]))
    train, _ = build_datasets(data | {"classes": ("no", "yes"), "values": (0, 255)}, RULE)
    assert train.labels(0)[0, [0, -1]].tolist() == [0, 1]


def test_broken_label_maps_are_refused_with_their_names_and_counts(folder):
    root, data = folder
    write(root / "masks" / "train" / "0.png", labels_of([0, 7, 9]))
    write(root / "masks" / "train" / "1.png", labels_of([0], (5, 5)))
    with pytest.raises(TaskError) as caught:
        build_datasets(data, RULE)
    message = str(caught.value)
    assert "\n" not in message
    assert "1 label map with unknown values (0.png has values that stand for no class: 7, 9)" in message
    assert "1 mask of another size than its image (1.png has 5x5 pixels, but its image 21x34)" in message
    write(root / "masks" / "train" / "0.png", np.zeros((21, 34, 3)))
    (root / "masks" / "train" / "1.png").write_bytes(b"no image")
    with pytest.raises(TaskError, match=r"2 damaged files .*channels; a label map has one"):
        build_datasets(data, RULE)
    (root / "masks" / "train" / "1.png").unlink()
    with pytest.raises(TaskError, match=r"1 image without a label map .*1\.jpg"):
        build_datasets(data, RULE)


def test_ade20k_counts_its_classes_from_one(tmp_path):
    for part in ("training", "validation"):
        write(tmp_path / "images" / part / "a.jpg", np.zeros((21, 34, 3)))
        write(tmp_path / "annotations" / part / "a.png", labels_of([0, 1, 150]))
    data = DATA | {"root": str(tmp_path), "augment": {"crop": 16}}
    train, val = build_datasets(data, InputRule(16, 64, 1, (0.5,) * 3, (0.5,) * 3))
    assert train.classes[149] == "flag"
    assert len(ADE20K_CLASSES) == 150
    assert val[0][1].unique().tolist() == [0, 149, IGNORE]
    assert val[0][0]["image"].shape == (3, 16, 26)


def test_cityscapes_has_19_of_34_ids(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_1_leftImg8bit.png", np.zeros((21, 34, 3)))
        write(tmp_path / "gtFine" / split / "ulm" / "ulm_0_1_gtFine_labelIds.png", labels_of(range(34)))
    data = DATA | {"name": "cityscapes", "root": str(tmp_path), "augment": {"crop": 16}}
    _, val = build_datasets(data, RULE)
    row = val[0][1][0].tolist()
    assert [row.index(label) for label in range(19)] == [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    assert row[0] == row[29] == IGNORE


def test_what_is_measured_may_stand_for_what_is_trained_on(tmp_path):
    write(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_0_1_leftImg8bit.png", np.zeros((21, 34, 3)))
    write(tmp_path / "gtFine" / "val" / "ulm" / "ulm_0_1_gtFine_labelIds.png", labels_of(range(34)))
    data = DATA | {"name": "cityscapes", "root": str(tmp_path), "augment": {"crop": 16}}
    with pytest.raises(TaskError, match="leftImg8bit/train: no such folder"):
        build_datasets(data, RULE)
    train, val = build_datasets(data | {"train": data["val"]}, RULE)
    assert train.files == val.files


def test_voc_masks_have_a_background(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (tmp_path / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("a\n")
    write(tmp_path / "JPEGImages" / "a.jpg", np.zeros((21, 34, 3)))
    palette = Image.fromarray(labels_of([0, 20, 255]), mode="L").convert("P")
    (tmp_path / "SegmentationClass").mkdir()
    palette.putdata(labels_of([0, 20, 255]).ravel().tolist())
    palette.save(tmp_path / "SegmentationClass" / "a.png")
    _, val = build_datasets(DATA | {"name": "voc", "root": str(tmp_path), "augment": {"crop": 16}}, RULE)
    assert val.classes[20] == "tvmonitor"
    assert val[0][1].unique().tolist() == [0, 20, IGNORE]


@pytest.fixture
def panoptic(tmp_path):
    """An image of sky, two cups and a crowd of cups."""
    ids = np.zeros((20, 33), np.int64)
    ids[:, :10], ids[5:9, 12:20], ids[10:15, 12:20], ids[16:, 20:] = 300, 70000, 9, 10
    for split in ("train", "val"):
        write(tmp_path / split / "a.png", np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1))
        write(tmp_path / "images" / "a.jpg", np.zeros((20, 33, 3)))
        kinds = [(300, 200, 0), (70000, 1, 0), (9, 1, 0), (10, 1, 1)]
        segments = [{"id": number, "category_id": kind, "iscrowd": crowd} for number, kind, crowd in kinds]
        content = {
            "images": [{"id": 1, "file_name": "a.jpg", "height": 20, "width": 33}],
            "categories": [{"id": 1, "name": "cup", "isthing": 1}, {"id": 200, "name": "sky", "isthing": 0}],
            "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    parts = {split: {"annotations": f"{split}.json", "images": "images", "maps": None} for split in ("train", "val")}
    data = DATA | {"name": "coco_panoptic", "root": str(tmp_path), "augment": {"crop": (24, 33), "flip": 0.0}} | parts
    return tmp_path, data


def test_panoptic_annotations_give_masks_segments_and_labels(panoptic):
    train, val = build_datasets(panoptic[1], RULE, "panoptic", as_masks=True)
    assert train.things == [True, False]
    image, target = train[0]
    assert image.shape == (3, 24, 33)
    assert target["labels"].tolist() == [1, 0, 0]
    assert target["masks"].shape == (3, 24, 33)
    assert target["masks"].sum((1, 2)).tolist() == [200, 32, 40]
    truth = val[0][1]
    assert truth[6, 13].tolist() == [0, 2]
    assert truth[17, 25].tolist()[0] == truth[0, 30].tolist()[0] == 2
    _, val = build_datasets(panoptic[1], RULE, "semantic")
    assert val[0][1].unique().tolist() == [0, 1, IGNORE]
    assert val[0][1][17, 25] == IGNORE


def test_segments_that_differ_from_their_picture_are_named(panoptic):
    root, data = panoptic
    write(root / "val" / "a.png", np.full((20, 33, 3), 1))
    with pytest.raises(TaskError, match=r"5 segments that differ from their picture \(.*val/a\.png: 65793 isn't in"):
        build_datasets(data, RULE, "panoptic", as_masks=True)


@pytest.mark.parametrize(("task", "classes", "count"), [("semantic", 2, 2), ("panoptic", 2, 58), ("instance", 1, 57)])
def test_nuclei_for_every_task(task, classes, count):
    data = DATA | {"name": "nuclei", "augment": {"crop": 128}}
    train, val = build_datasets(data, RULE, task, as_masks=True)
    assert len(train.classes) == classes
    assert len(val.segments(0)[1]) == count
    _, target = train[0]
    assert target["masks"].shape[1:] == (128, 128)
    assert target["masks"].any(2).any(1).all()
    assert target["masks"].sum(0).max() == 1


@pytest.mark.parametrize(
    ("change", "task", "reason"),
    [
        ({"name": "ade"}, "semantic", "unknown data set 'ade'; did you mean 'ade20k'"),
        ({"name": "ade20k"}, "panoptic", "ade20k has no annotations for panoptic segmentation, only for semantic"),
        ({"root": None}, "semantic", r"data\.root is not set"),
        ({"num_classes": 4}, "semantic", "num_classes is 4, but .* has 3"),
        ({"classes": ("a", "b"), "values": (0,)}, "semantic", r"data\.values needs a number"),
    ],
)
def test_what_does_not_fit_is_refused(folder, change, task, reason):
    with pytest.raises(TaskError, match=reason):
        build_datasets(folder[1] | change, RULE, task)
