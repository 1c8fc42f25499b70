import json

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.coco import decode_masks
from foveate.tasks.detect import Task
from foveate.tasks.detect.data import build_datasets
from foveate.tasks.voc import read_voc
from PIL import Image

DATA = Task.DEFAULTS["data"]


def test_nuclei_of_the_halves_are_those_of_the_micrograph():
    train, val = build_datasets(DATA | {"name": "nuclei", "repeat": 3, "augment": {"crop": 100}}, True)
    assert (len(train), len(val), train.classes) == (3, 1, ["nucleus"])
    image, target = val[0]
    assert image.shape == (3, 512, 256)
    assert image.dtype == torch.uint8
    assert len(target["labels"]) == len(target["masks"]) == 57
    masks = torch.from_numpy(decode_masks(target["masks"], 512, 256)).bool()
    assert masks.any(0).float().mean() == pytest.approx(0.1737, abs=1e-4)
    np.testing.assert_allclose(masks.sum((1, 2)), target["area"])
    (a, b), targets = train.collate([train[0], train[2]])
    assert a.shape == b.shape == (3, 100, 100)
    assert all(target["masks"].shape[1:] == (100, 100) for target in targets)
    assert all(target["boxes"].dtype == torch.float32 for target in targets)


@pytest.fixture
def coco_root(tmp_path):
    """Two sets of three images of different sizes: with two objects, one of them a crowd; with a crowd; without."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        images, annotations = [], []
        for index, (height, width) in enumerate([(40, 61), (33, 50), (50, 30)]):
            pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{index}.png")
            images.append({"id": index, "file_name": f"{index}.png", "height": height, "width": width})
        for number, (image, crowd) in enumerate([(0, 0), (0, 1), (1, 1)]):
            runs = {"size": [images[image]["height"], images[image]["width"]]}
            runs["counts"] = [5, 4, runs["size"][0] * runs["size"][1] - 9]
            box = {"bbox": [3, 4, 12, 9], "area": 108, "iscrowd": crowd, "segmentation": runs}
            annotations.append({"id": number, "image_id": image, "category_id": 1 + number % 2} | box)
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    parts = {split: {"annotations": f"{split}.json", "images": split, "split": split} for split in ("train", "val")}
    return tmp_path, DATA | {"root": str(tmp_path)} | parts


def test_crowds_are_measured_but_not_trained_on(coco_root):
    train, val = build_datasets(coco_root[1], True)
    assert [len(train[index][1]["labels"]) for index in range(3)] == [1, 0, 0]
    assert [val[index][1]["iscrowd"].tolist() for index in range(3)] == [[0, 1], [1], []]
    assert train[2][1]["masks"].shape == (0, 50, 30)
    train, _ = build_datasets(coco_root[1] | {"keep_empty": False}, True)
    assert len(train) == 1


def test_what_does_not_fit_is_refused(coco_root):
    root, data = coco_root
    with pytest.raises(TaskError, match=r"num_classes is 80, but .* has 2"):
        build_datasets(data | {"num_classes": 80}, True)
    with pytest.raises(TaskError, match="did you mean 'coco'"):
        build_datasets(data | {"name": "cocoo"}, True)
    with pytest.raises(TaskError, match=r"data\.root is not set"):
        build_datasets(data | {"root": None}, True)
    with pytest.raises(TaskError, match="refuse or drop"):
        build_datasets(data | {"broken": "ignore"}, True)
    _, val = build_datasets(data, True)
    kept = (root / "val" / "1.png").read_bytes()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "val" / "1.png")
    with pytest.raises(TaskError, match=r"val/1\.png: has 9x9 pixels, but its annotations say 33x50"):
        val[1]
    (root / "val" / "1.png").write_bytes(kept)
    content = json.loads((root / "val.json").read_text())
    content["categories"][1]["name"] = "c"
    (root / "val.json").write_text(json.dumps(content))
    with pytest.raises(TaskError, match=r"different classes: \['b', 'c'\]"):
        build_datasets(data, True)


OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


@pytest.fixture
def voc_root(tmp_path):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationObject"):
        (tmp_path / name).mkdir(parents=True)
    Image.fromarray(np.zeros((30, 47, 3), np.uint8)).save(tmp_path / "JPEGImages" / "x1.jpg")
    numbers = np.zeros((30, 47), np.uint8)
    numbers[2:10, 0:20], numbers[20:30, 40:47] = 1, 2
    Image.fromarray(numbers).save(tmp_path / "SegmentationObject" / "x1.png")
    for folder in ("Main", "Segmentation"):
        (tmp_path / "ImageSets" / folder / "train.txt").write_text("x1\n")

    def write(*objects):
        size = "<size><width>47</width><height>30</height></size>"
        (tmp_path / "Annotations" / "x1.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
        return tmp_path

    return write


def test_voc_objects_are_read_with_boxes_from_zero(voc_root):
    objects = (
        OBJECT.format(name="dog", difficult=0, box=(1, 3, 20, 10)),
        OBJECT.format(name="cat", difficult=1, box=(41, 21, 47, 30)),
    )
    (record,) = read_voc(voc_root(*objects), "train", with_masks=True)
    assert record.size == (30, 47)
    assert record.instances.boxes.tolist() == [[0, 2, 20, 10], [40, 20, 47, 30]]
    assert record.instances.labels.tolist() == [11, 7]
    assert record.instances.crowd.tolist() == [False, True]
    assert record.instances.areas.tolist() == [160, 70]


def test_faults_of_voc_annotations_are_listed(voc_root):
    root = voc_root(
        OBJECT.format(name="unicorn", difficult=0, box=(1, 3, 20, 10)),
        OBJECT.format(name="cat", difficult=0, box=(1, 3, 60, 10)),
        OBJECT.format(name="cat", difficult=0, box=(9, 3, 2, 10)),
    )
    (root / "ImageSets" / "Main" / "train.txt").write_text("x1\nx2\n")
    with pytest.raises(TaskError) as caught:
        read_voc(root, "train")
    for part in (
        "x2.jpg",
        "1 unknown category (x1.xml, object 1: unicorn)",
        "1 box outside its image",
        "positive width",
    ):
        assert part in str(caught.value)
    with pytest.raises(TaskError, match=r"val\.txt: no such file"):
        read_voc(root, "val")
