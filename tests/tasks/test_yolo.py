"""YOLO's data sets: read, refused in one line where they are wrong, converted, and as good as COCO's to train on."""

import json
import shutil

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.checkpoints import read_checkpoint
from foveate.tasks.data.coco import decode_masks, encode_mask, read_instances
from foveate.tasks.data.convert import convert, count_lost
from foveate.tasks.data.formats import open_maps, open_objects, recognise
from foveate.tasks.data.polygons import join_polygons, trace_mask
from foveate.tasks.data.segmentation import InputRule
from foveate.tasks.data.yolo import read_yolo
from foveate.tasks.detect import Task as Detect
from foveate.tasks.segment import Task as Segment
from PIL import Image

RULE = InputRule(None, 1, 1, (0.5,) * 3, (0.5,) * 3)
SIZES = ((40, 60), (33, 50), (50, 30))
BOX, POLYGON = "0 0.5 0.5 0.25 0.5", "1 0.1 0.1 0.6 0.1 0.6 0.7 0.1 0.7"


def write(root, name, text):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.fixture
def root(tmp_path):
    """Three images a split: with a polygon and another, with one, without a file of labels."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for index, (height, width) in enumerate(SIZES):
            write(tmp_path, f"images/{split}/{index}.png", "")
            pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{index}.png")
        write(tmp_path, f"labels/{split}/0.txt", f"{POLYGON}\n0 0.333333 0.2 0.9 0.3 0.7 0.87 0.41 0.6\n")
        write(tmp_path, f"labels/{split}/1.txt", f"{POLYGON}\n")
    write(tmp_path, "data.yaml", "train: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n")
    return tmp_path


def settings(root, task=Detect, **changes):
    return task.DEFAULTS["data"] | {"name": "yolo", "root": str(root), "augment": {"crop": 20}} | changes


def test_a_folder_without_its_data_yaml_is_told_what_it_lacks(root):
    (root / "data.yaml").unlink()
    with pytest.raises(TaskError, match=r"data\.yaml: no such file; it says where the images"):
        recognise(root, "objects")
    shutil.rmtree(root / "labels")
    assert recognise(root, "objects") is None


def test_boxes_and_polygons_are_read_in_pixels(root):
    write(root, "labels/train/1.txt", f"{BOX}\n\n{POLYGON}\n")
    records, names = read_yolo(root, "train", with_masks=None)
    assert names == ["cat", "dog"]
    assert [record.file.name for record in records] == ["0.png", "1.png", "2.png"]
    assert [len(record.instances) for record in records] == [2, 2, 0]
    boxes = records[1].instances
    assert boxes.labels.tolist() == [0, 1]
    assert boxes.boxes[0].tolist() == [0.375 * 50, 0.25 * 33, 0.375 * 50 + 12.5, 0.25 * 33 + 16.5]
    assert boxes.boxes[1] == pytest.approx([5, 3.3, 30, 23.1])
    assert boxes.masks[0] is None
    assert decode_masks([boxes.masks[1]], 33, 50).sum() == boxes.areas[1] == 25 * 20
    train, val = open_maps(settings(root, Segment, broken="drop", augment={"crop": 60}), RULE, "instance", True)
    assert train[0][1]["masks"].shape[0] == 2
    assert len(val) == 3


LISTED = {
    "roboflow": ("train: ../images/train\nval: ../images/val\nnc: 2\nnames: ['cat', 'dog']\n", {}),
    "numbered names, and a path that is elsewhere": (
        "path: ../datasets/none\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n",
        {},
    ),
    "lists of images": (
        "train: train.txt\nval: [images/val]\nnames: [cat, dog]\n",
        {"train.txt": "./images/train/1.png\nimages/train/0.png\nimages/train/2.png\n"},
    ),
}


@pytest.mark.parametrize("form", LISTED)
def test_the_places_of_images_are_found(root, form):
    text, files = LISTED[form]
    write(root, "data.yaml", text)
    for name, content in files.items():
        write(root, name, content)
    train, val = open_objects(settings(root), True)
    names = [record.file.name for record in train.records]
    assert names == (["1.png", "0.png", "2.png"] if "lists" in form else ["0.png", "1.png", "2.png"])
    assert len(val.records) == 3


FAULTS = {
    "a class beyond the names": ("labels/train/0.txt", "7 0.5 0.5 0.1 0.1", "unknown category .*0.txt, line 1: 7"),
    "a class below 0": ("labels/train/0.txt", "-1 0.5 0.5 0.1 0.1", "unknown category .*line 1: -1"),
    "a class of a half": ("labels/train/0.txt", "0.5 0.5 0.5 0.1 0.1", "malformed entry .*line 1"),
    "words": ("labels/train/0.txt", "cat 0.5 0.5 0.1 0.1", "malformed entry .*line 1: 'cat"),
    "nan": ("labels/train/0.txt", "0 nan 0.5 0.1 0.1", "malformed entry .*line 1"),
    "a score": ("labels/train/0.txt", "0 0.5 0.5 0.1 0.1 0.9", "6 numbers; a box has 5, a polygon 7"),
    "half a point": ("labels/train/0.txt", f"{POLYGON} 0.5", "10 numbers"),
    "pixels": ("labels/train/0.txt", "0 30 20 10 10", "box outside its image .*line 1"),
    "no width": ("labels/train/0.txt", "0 0.5 0.5 0 0.1", "positive width and height .*line 1"),
    "a line instead of a polygon": ("labels/train/0.txt", "0 0.1 0.1 0.2 0.1 0.3 0.1", "positive width"),
    "a polygon outside": ("labels/train/0.txt", "0 0.1 0.1 1.3 0.1 0.3 0.6", "box outside"),
    "not text": ("labels/train/0.txt", b"\xff\xfe0", "damaged file .*UTF-8"),
    "labels of no image": ("labels/train/9.txt", BOX, "annotation of an unknown image .*9.txt"),
    "an image that is none": ("images/train/0.png", "no picture", "damaged file .*0.png"),
    "two images of one name": ("images/train/1.jpg", "", "duplicate id .*share one file of labels"),
    "a place that isn't there": ("data.yaml", "train: nowhere\nval: images/val\nnames: [a]", "train is nowhere, but"),
    "no split": ("data.yaml", "val: images/val\nnames: [cat, dog]", "has no 'train'.* it has val"),
    "no names": ("data.yaml", "train: images/train\nval: images/val", "has no list of `names`"),
    "a name twice": ("data.yaml", "train: images/train\nval: images/val\nnames: [a, a]", "names the class 'a' twice"),
    "a number that is left out": ("data.yaml", "train: images/train\nnames: {0: a, 2: b}", "number the classes 0 to 1"),
    "another count": ("data.yaml", "train: images/train\nnc: 3\nnames: [a, b]", "nc is 3, but `names` has 2"),
    "keypoints": ("data.yaml", "train: images/train\nkpt_shape: [17, 3]\nnames: [a]", "keypoints"),
    "no YAML": ("data.yaml", "train: [", "can't be read as YAML"),
    "another file": ("data.yaml", "train: images/train/0.png\nnames: [a]", "but a list of images ends with .txt"),
    "a list with a missing image": ("data.yaml", "train: all.txt\nval: images/val\nnames: [cat, dog]", "missing image"),
}


@pytest.mark.parametrize("form", FAULTS)
def test_every_malformed_form_is_one_line_before_training(root, form):
    name, content, message = FAULTS[form]
    write(root, name, "")
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write(root, "all.txt", "images/train/0.png\nimages/train/nine.png\n")
    with pytest.raises(TaskError, match=message) as error:
        open_objects(settings(root), False)
    assert "\n" not in str(error.value)
    if name != "data.yaml" or "missing" in form:
        with pytest.warns(UserWarning, match="left out"):
            train, _ = open_objects(settings(root, broken="drop"), False)
        assert len(train)


def test_what_is_missing_where_masks_are_needed_is_said(root):
    write(root, "labels/train/1.txt", BOX)
    with pytest.raises(TaskError, match=r"box without a polygon.*1.txt, line 1.*detectors.*model.head=faster_rcnn"):
        open_objects(settings(root), True)
    shutil.rmtree(root / "labels")
    with pytest.raises(TaskError, match=r"no image of train has a file of labels, such as .*labels/train/0.txt"):
        open_objects(settings(root), True)
    (root / "data.yaml").unlink()
    with pytest.raises(TaskError, match=r"data.yaml: no such file"):
        open_objects(settings(root), True)


def test_other_names_than_data_yaml_s_are_refused(root):
    with pytest.raises(TaskError, match=r"data.classes is \['cat', 'dogs'\], but .*did you mean 'dog'"):
        open_objects(settings(root, classes=("cat", "dogs")), False)


def coco_copy(root, output):
    splits = {split: read_yolo(root, split, None)[0] for split in ("train", "val")}
    convert(splits, ["cat", "dog"], output, "coco")
    parts = {
        split: {"annotations": f"annotations/instances_{split}.json", "images": f"images/{split}", "split": split}
        for split in splits
    }
    return parts, splits


def test_yolo_to_coco_and_back_is_the_same(root, tmp_path):
    write(root, "labels/train/1.txt", f"{BOX}\n{POLYGON}\n")
    parts, splits = coco_copy(root, tmp_path / "coco")
    for split, part in parts.items():
        path, folder = tmp_path / "coco" / part["annotations"], tmp_path / "coco" / part["images"]
        records, names, _ = read_instances(path, folder, None)
        assert names == ["cat", "dog"]
        convert({split: records}, names, tmp_path / f"back-{split}", "yolo")
        again, _ = read_yolo(tmp_path / f"back-{split}", split, None)
        for first, second, third in zip(splits[split], records, again, strict=True):
            assert first.file.read_bytes() == second.file.read_bytes() == third.file.read_bytes()
            for other in (second.instances, third.instances):
                assert np.array_equal(first.instances.boxes, other.boxes)
                assert np.array_equal(first.instances.areas, other.areas)
                assert np.array_equal(first.instances.labels, other.labels)
                for one, two in zip(first.instances.masks, other.masks, strict=True):
                    assert (one is None) == (two is None)
                    assert one is None or np.array_equal(one, two)
    with pytest.raises(TaskError, match="is there already"):
        convert(splits, names, tmp_path / "coco", "yolo")


def test_what_yolo_can_t_hold_is_named_and_the_rest_stays(root, tmp_path):
    mask = np.zeros(SIZES[0], np.uint8)
    mask[5:30, 5:40] = 1
    mask[10:14, 10:20] = 0
    ring, parts = encode_mask(mask), [[2, 2, 9, 2, 9, 9, 2, 9], [20, 20, 30, 20, 30, 30, 20, 30]]
    image = {"id": 7, "file_name": "0.png", "height": SIZES[0][0], "width": SIZES[0][1]}
    runs = {"size": [*SIZES[0]], "counts": ring["counts"].decode()}
    annotations = [
        {"bbox": [5, 5, 35, 25], "segmentation": runs},
        {"bbox": [2, 2, 28, 28], "segmentation": parts},
        {"bbox": [5, 5, 35, 25], "iscrowd": 1, "segmentation": runs},
    ]
    annotations = [{"id": key, "image_id": 7, "category_id": 3} | entry for key, entry in enumerate(annotations)]
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 3, "name": "a"}]}
    write(tmp_path, "all.json", json.dumps(content))
    records, _, _ = read_instances(tmp_path / "all.json", root / "images" / "train")
    lost = count_lost({"train": records}, "yolo")
    assert lost == [
        "1 crowds, which are left out",
        "1 ids of images, which become names",
        "1 objects in several parts, which are joined by lines",
        "1 holes in objects, which are filled",
    ]
    assert count_lost({"train": records}, "coco") == []
    convert({"train": records}, ["a"], tmp_path / "yolo", "yolo")
    (again,), _ = read_yolo(tmp_path / "yolo", "train", True)
    masks = decode_masks(again.instances.masks, *SIZES[0])
    expected = decode_masks(records[0].instances.masks[:2], *SIZES[0])
    expected[0, 10:14, 10:20] = 1
    assert np.array_equal(masks[0], expected[0])
    # The line between the parts may set pixels of its own.
    assert (masks[1] >= expected[1]).all()
    assert masks[1].sum() <= expected[1].sum() + 15


def test_outlines_of_masks_follow_the_edges_of_pixels():
    draw = np.random.default_rng(0)
    for _ in range(20):
        mask = (draw.random((9, 11)) > 0.4).astype(np.uint8)
        mask = np.kron(mask, np.ones((3, 3), np.uint8))
        polygons, holes = trace_mask(mask)
        filled = decode_masks([polygons], *mask.shape)[0]
        assert (filled >= mask).all()
        if not holes:
            assert np.array_equal(filled, mask)
    assert trace_mask(np.zeros((4, 4))) == ([], 0)
    assert join_polygons([np.array([0.0, 0, 1, 0, 1, 1])]).tolist() == [0, 0, 1, 0, 1, 1]


OF_DETECTORS = ("hidden=16", "region_samples=8", "min_size=48", "max_size=64")


@pytest.mark.parametrize(
    ("recipe", "kwargs"),
    [("detect/mask_rcnn_nat_atto_nuclei", OF_DETECTORS), ("segment/upernet_nat_atto_nuclei", ())],
)
def test_a_yolo_and_a_coco_copy_train_to_the_same_numbers(recipe, kwargs, root, tmp_path):
    parts, _ = coco_copy(root, tmp_path / "coco")
    found = []
    for name, where in (("yolo", root), ("coco", tmp_path / "coco")):
        overrides = [
            f"data.name={name}",
            f"data.root={where}",
            *(f"data.{split}.{key}={value}" for split, part in parts.items() for key, value in part.items()),
            "data.repeat=1",
            "data.augment.crop=24",
            "epochs=2",
            "val_interval=2",
            "batch_size=2",
            "model.kwargs.channels=16",
            "schedule.warmup_iterations=0",
            *(f"model.kwargs.{option}" for option in kwargs),
        ]
        config = engine.load_config(recipe, overrides)
        result = engine.train(config, tmp_path / name, progress=False)
        history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result["history"]]
        found.append((history, read_checkpoint(result["last"])["state_dict"]))
    (history, weights), (others, other_weights) = found
    assert history == others
    assert history[0]["train/loss"] > 0
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
