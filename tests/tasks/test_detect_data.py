import json
import shutil

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.data.coco import decode_masks
from foveate.tasks.data.formats import open_objects, recognise
from foveate.tasks.data.voc import read_voc
from foveate.tasks.detect import Task
from PIL import Image

DATA = Task.DEFAULTS["data"]


def test_nuclei_of_the_halves_are_those_of_the_micrograph():
    train, val = open_objects(DATA | {"name": "nuclei", "repeat": 3, "augment": {"crop": 100}}, True)
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
    train, val = open_objects(coco_root[1], True)
    assert [len(train[index][1]["labels"]) for index in range(3)] == [1, 0, 0]
    assert [val[index][1]["iscrowd"].tolist() for index in range(3)] == [[0, 1], [1], []]
    assert train[2][1]["masks"].shape == (0, 50, 30)
    train, _ = open_objects(coco_root[1] | {"keep_empty": False}, True)
    assert len(train) == 1


def test_what_does_not_fit_is_refused(coco_root):
    root, data = coco_root
    with pytest.raises(TaskError, match=r"num_classes is 80, but .* has 2"):
        open_objects(data | {"num_classes": 80}, True)
    with pytest.raises(TaskError, match="did you mean 'coco'"):
        open_objects(data | {"name": "cocoo"}, True)
    with pytest.raises(TaskError, match=r"data\.root is not set"):
        open_objects(data | {"root": None}, True)
    with pytest.raises(TaskError, match="refuse or drop"):
        open_objects(data | {"broken": "ignore"}, True)
    _, val = open_objects(data, True)
    kept = (root / "val" / "1.png").read_bytes()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "val" / "1.png")
    with pytest.raises(TaskError, match=r"val/1\.png: has 9x9 pixels, but its annotations say 33x50"):
        val[1]
    (root / "val" / "1.png").write_bytes(kept)
    content = json.loads((root / "val.json").read_text())
    content["categories"][1]["name"] = "c"
    (root / "val.json").write_text(json.dumps(content))
    with pytest.raises(TaskError, match=r"different classes: \['b', 'c'\]"):
        open_objects(data, True)


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


def test_what_a_voc_folder_lacks_is_named(voc_root):
    root = voc_root(OBJECT.format(name="dog", difficult=0, box=(1, 3, 20, 10)), "<object></object>")
    settings = recognise(root, "objects")[1]
    assert "classes" not in settings  # Pascal's: an object without a name is none
    with pytest.raises(TaskError, match=r"1 unknown category \(x1\.xml, object 2: no name\)") as caught:
        read_voc(root, "train")
    assert "these are your classes" not in str(caught.value)
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n")
    with pytest.raises(TaskError, match=r"Main/train\.txt: lists no image"):
        recognise(root, "objects")
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    assert recognise(root, "objects") is None  # label maps are listed
    (root / "ImageSets" / "Segmentation" / "train.txt").unlink()
    with pytest.raises(TaskError, match=r"Main/train\.txt: no such file; list the names of the images to train on"):
        recognise(root, "objects")


def test_a_list_may_hold_names_with_spaces_and_pascal_s_second_column(voc_root):
    root = voc_root(OBJECT.format(name="dog", difficult=0, box=(1, 3, 20, 10)))
    for name in ("cell", "cell 1", "cell 2"):
        shutil.copy(root / "JPEGImages" / "x1.jpg", root / "JPEGImages" / f"{name}.jpg")
        shutil.copy(root / "Annotations" / "x1.xml", root / "Annotations" / f"{name}.xml")
    listing = root / "ImageSets" / "Main" / "train.txt"
    for text, names in (
        ("cell\r\ncell 1\r\ncell 2\r\n", ["cell", "cell 1", "cell 2"]),
        ("\ufeffcell 1\n", ["cell 1"]),
        ("x1  1\ncell -1\n", ["x1", "cell"]),
    ):
        listing.write_text(text, encoding="utf-8")
        assert [record.id for record in read_voc(root, "train")] == names
    listing.write_bytes("x1\ncaf\u00e9\n".encode("cp1252"))
    with pytest.raises(TaskError, match=r"train\.txt, line 2: is not text in UTF-8"):
        read_voc(root, "train")


@pytest.mark.parametrize("name", ["x1.JPG", "x1.png", "x1.bmp"])
def test_pictures_of_voc_may_have_any_ending(voc_root, name):
    root = voc_root(OBJECT.format(name="dog", difficult=0, box=(1, 3, 20, 10)))
    with Image.open(root / "JPEGImages" / "x1.jpg") as picture:
        picture.load()
    (root / "JPEGImages" / "x1.jpg").unlink()
    picture.save(root / "JPEGImages" / name)
    (record,) = read_voc(root, "train", with_masks=True)
    assert record.file.name == name
    picture.save(root / "JPEGImages" / "x1.tif")
    with pytest.raises(TaskError, match=rf"1 duplicate id \(.*{name} and .*x1\.tif"):
        read_voc(root, "train")


def test_a_size_that_labelimg_does_not_know_is_the_picture_s(voc_root):
    root = voc_root(OBJECT.format(name="dog", difficult=0, box=(1, 3, 20, 10)))
    path = root / "Annotations" / "x1.xml"
    whole = path.read_text()
    for text in (
        whole.replace("47", "0").replace("30", "0"),
        whole.replace("<size><width>47</width><height>30</height></size>", ""),
    ):
        path.write_text(text)
        (record,) = read_voc(root, "train")
        assert record.size == (30, 47)
        assert len(record.instances) == 1


VOC_FORMS = {
    "truncated": (lambda text: text[:-9], "1 damaged file (Annotations/x1.xml)"),
    "unknown encoding": (lambda text: '<?xml version="1.0" encoding="foo"?>' + text, "1 damaged file"),
    "size in words": (lambda text: text.replace(">47<", ">wide<"), "x1.xml: size 30 x wide"),
    "negative size": (lambda text: text.replace(">47<", ">-47<"), "x1.xml: size 30 x -47"),
    "size that is NaN": (lambda text: text.replace(">47<", ">nan<"), "x1.xml: size 30 x nan"),
    "half a size": (lambda text: text.replace("<width>47</width>", ""), "x1.xml: size 30 x 0"),
    "another size": (lambda text: text.replace(">47<", ">46<"), "1 image of another size than annotated"),
    "box that is NaN": (lambda text: text.replace("<xmin>1<", "<xmin>nan<"), "box that isn't four numbers"),
    "huge box": (lambda text: text.replace("<xmax>20<", "<xmax>1e400<"), "box that isn't four numbers"),
    "box beyond": (lambda text: text.replace("<xmax>20<", "<xmax>1e30<"), "1 box outside its image"),
    "no box": (lambda text: text.replace("<xmin>1</xmin>", ""), "box that isn't four numbers"),
    "nested number": (lambda text: text.replace("<xmin>1<", "<xmin><a>1</a><"), "box that isn't four numbers"),
    "no name": (lambda text: text.replace("<name>dog</name>", ""), "1 unknown category (x1.xml, object 1: no name)"),
    "difficult in words": (lambda text: text.replace("<difficult>0<", "<difficult>no<"), "object 1: difficult 'no'"),
}


@pytest.mark.parametrize("form", VOC_FORMS)
def test_every_malformed_form_of_voc_is_answered_before_training_and_can_be_left_out(voc_root, form):
    root = voc_root(OBJECT.format(name="dog", difficult=0, box=(1, 3, 20, 10)))
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationObject", "png")):
        shutil.copy(root / folder / f"x1.{ending}", root / folder / f"good.{ending}")
    for folder in ("Main", "Segmentation"):
        (root / "ImageSets" / folder / "train.txt").write_text("x1\ngood\n")
    spoil, expected = VOC_FORMS[form]
    path = root / "Annotations" / "x1.xml"
    path.write_text(spoil(path.read_text()))
    part = {split: DATA[split] | {"split": "train"} for split in ("train", "val")}
    for with_masks in (False, True):
        with pytest.raises(TaskError) as caught:
            read_voc(root, "train", with_masks=with_masks)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        data = DATA | {"name": "voc", "root": str(root), "broken": "drop"} | part
        with pytest.warns(UserWarning, match="left out"):
            train, val = open_objects(data, with_masks)
        train.collate([train[index] for index in range(len(train))])
        assert sum(len(val[index][1]["labels"]) for index in range(len(val))) == 1


def test_damaged_object_maps_of_voc_are_listed(voc_root):
    root = voc_root(OBJECT.format(name="dog", difficult=0, box=(1, 3, 20, 10)))
    path = root / "SegmentationObject" / "x1.png"
    path.write_bytes(b"no image")
    with pytest.raises(TaskError, match=r"1 damaged file .*x1\.png: not an image, or damaged"):
        read_voc(root, "train", with_masks=True)
    Image.fromarray(np.zeros((30, 47, 3), np.uint8)).save(path)
    with pytest.raises(TaskError, match=r"1 damaged file .*a label map has one"):
        read_voc(root, "train", with_masks=True)


def test_voc_s_own_classes_are_named_as_the_cure_and_taken(voc_root):
    root = voc_root(OBJECT.format(name="cell", difficult=0, box=(1, 3, 20, 10)))
    part = {split: DATA[split] | {"split": "train"} for split in ("train", "val")}
    data = DATA | {"name": "voc", "root": str(root)} | part
    with pytest.raises(TaskError, match=r"1 unknown category .*name all with data\.classes, such as \['cell'\]"):
        open_objects(data, False)
    train, _ = open_objects(data | {"classes": ("debris", "cell")}, False)
    assert train.classes == ["debris", "cell"]
    assert train[0][1]["labels"].tolist() == [1]
    for classes, reason in ((("background", "cell"), "objects' classes only"), (("cell", "cell"), "twice")):
        with pytest.raises(TaskError, match=reason):
            open_objects(data | {"classes": classes}, False)


def test_categories_in_another_order_are_mapped_by_name(coco_root):
    root, data = coco_root
    _, before = open_objects(data, True)
    content = json.loads((root / "val.json").read_text())
    content["categories"] = [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}]
    (root / "val.json").write_text(json.dumps(content))
    train, val = open_objects(data, True)
    assert val.classes == train.classes == ["a", "b"]
    assert val[0][1]["labels"].tolist() == before[0][1]["labels"].tolist() == [0, 1]
    train, val = open_objects(data | {"classes": ("b", "a")}, True)
    assert val.classes == train.classes == ["b", "a"]
    assert val[0][1]["labels"].tolist() == [1, 0]
    with pytest.raises(TaskError, match=r"data\.classes is \['b', 'c'\], but .*train\.json has \['a', 'b'\]"):
        open_objects(data | {"classes": ("b", "c")}, True)


def test_a_photo_that_exif_turns_is_found_before_training(coco_root):
    root, data = coco_root
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "train" / "0.png"
    Image.fromarray(np.zeros((40, 61, 3), np.uint8)).save(path, exif=exif)
    for with_masks in (True, False):
        with pytest.raises(TaskError, match=r"1 image that its EXIF entry turns .*0\.png is 61x40, annotated 40x61"):
            open_objects(data, with_masks)
        with pytest.warns(UserWarning, match="EXIF"):
            train, _ = open_objects(data | {"broken": "drop"}, with_masks)
        assert [record.file.name for record in train.records] == ["1.png", "2.png"]
    path.write_bytes(b"no image")
    with pytest.raises(TaskError, match="1 damaged file"):
        open_objects(data, True)
    train, _ = open_objects(data, True, skip_damaged=True)
    assert len(train) == 3


def test_an_area_that_is_not_given_is_the_mask_s(coco_root):
    root, data = coco_root
    content = json.loads((root / "val.json").read_text())
    runs = {"size": [40, 61], "counts": [45, 7, 33, 7, 40 * 61 - 92]}
    content["annotations"][0] |= {"segmentation": runs}
    del content["annotations"][0]["area"], content["annotations"][1]["area"], content["annotations"][1]["segmentation"]
    (root / "val.json").write_text(json.dumps(content))
    _, val = open_objects(data, False)
    assert val[0][1]["area"].tolist() == [14, 108]
