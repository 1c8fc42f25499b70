import json
import shutil

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.data.ade20k import CLASSES as ADE20K_CLASSES
from foveate.tasks.data.augment import IGNORE
from foveate.tasks.data.formats import open_maps, recognise
from foveate.tasks.data.segmentation import InputRule
from foveate.tasks.segment import Task
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
    train, val = open_maps(folder[1], RULE)
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
    train, _ = open_maps(data | {"classes": ("no", "yes"), "values": (0, 255)}, RULE)
    assert train.labels(0)[0, [0, -1]].tolist() == [0, 1]


def test_broken_label_maps_are_refused_with_their_names_and_counts(folder):
    root, data = folder
    write(root / "masks" / "train" / "0.png", labels_of([0, 7, 9]))
    write(root / "masks" / "train" / "1.png", labels_of([0], (5, 5)))
    with pytest.raises(TaskError) as caught:
        open_maps(data, RULE)
    message = str(caught.value)
    assert "\n" not in message
    assert "1 label map with unknown values (0.png has values that stand for no class: 7, 9)" in message
    assert "1 mask of another size than its image (1.png has 5x5 pixels, but its image 21x34)" in message
    write(root / "masks" / "train" / "0.png", np.zeros((21, 34, 3)))
    (root / "masks" / "train" / "1.png").write_bytes(b"no image")
    with pytest.raises(TaskError, match=r"2 damaged files .*channels; a label map has one"):
        open_maps(data, RULE)
    (root / "masks" / "train" / "1.png").unlink()
    with pytest.raises(TaskError, match=r"1 image without a label map .*1\.jpg"):
        open_maps(data, RULE)


def test_label_maps_whose_images_are_gone_are_named(folder):
    root, data = folder
    (root / "images" / "train" / "1.jpg").unlink()
    with pytest.raises(TaskError, match=r"1 label map without an image \(\S*masks/train/1\.png\)"):
        open_maps(data, RULE)
    with pytest.warns(UserWarning, match="1 label map without an image"):
        assert len(open_maps(data | {"broken": "drop"}, RULE)[0]) == 1
    (root / "masks" / "train" / "1.png").rename(root / "masks" / "train" / "1.PNG")
    write(root / "masks" / "train" / "2.tif", labels_of([0]))
    write(root / "masks" / "train" / "0.bmp", labels_of([0]))  # beside 0.png, a look at it
    with pytest.raises(TaskError, match=r"2 label maps without an image \(\S*1\.PNG, \S*2\.tif\)"):
        open_maps(data, RULE)


def test_images_that_share_a_label_map_are_named(folder):
    root, data = folder
    write(root / "images" / "train" / "1.bmp", np.zeros((21, 34, 3)))
    with pytest.raises(TaskError, match=r"1 duplicate id \(\S*1\.bmp and 1\.jpg share one label map\)"):
        open_maps(data, RULE)
    with pytest.warns(UserWarning, match="share one label map"):
        assert len(open_maps(data | {"broken": "drop"}, RULE)[0]) == 2


def test_held_out_images_whose_masks_are_gone_are_not_passed_over(folder):
    root, data = folder
    shutil.rmtree(root / "masks" / "val")
    name, settings = recognise(root, "maps")
    with pytest.raises(TaskError, match=r"2 images without a label map \(\S*val/0\.jpg: no \S*masks/val/0\.png"):
        open_maps(data | {"name": name} | settings, RULE)


def test_ade20k_counts_its_classes_from_one(tmp_path):
    for part in ("training", "validation"):
        write(tmp_path / "images" / part / "a.jpg", np.zeros((21, 34, 3)))
        write(tmp_path / "annotations" / part / "a.png", labels_of([0, 1, 150]))
    data = DATA | {"root": str(tmp_path), "augment": {"crop": 16}}
    train, val = open_maps(data, InputRule(16, 64, 1, (0.5,) * 3, (0.5,) * 3))
    assert train.classes[149] == "flag"
    assert len(ADE20K_CLASSES) == 150
    assert val[0][1].unique().tolist() == [0, 149, IGNORE]
    assert val[0][0]["image"].shape == (3, 16, 26)
    write(tmp_path / "annotations" / "training" / "b.png", labels_of([0, 1, 150]))
    with pytest.raises(TaskError, match=r"1 label map without an image \(\S*annotations/training/b\.png\)"):
        open_maps(data, InputRule(16, 64, 1, (0.5,) * 3, (0.5,) * 3))


def test_cityscapes_has_19_of_34_ids(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_1_leftImg8bit.png", np.zeros((21, 34, 3)))
        write(tmp_path / "gtFine" / split / "ulm" / "ulm_0_1_gtFine_labelIds.png", labels_of(range(34)))
    data = DATA | {"name": "cityscapes", "root": str(tmp_path), "augment": {"crop": 16}}
    _, val = open_maps(data, RULE)
    row = val[0][1][0].tolist()
    assert [row.index(label) for label in range(19)] == [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    assert row[0] == row[29] == IGNORE


def test_cityscapes_objects_are_told_by_their_ids(tmp_path):
    ids = np.full((21, 34), 7, np.uint16)
    ids[2:5, 3:9], ids[10:12, 20:30], ids[15:, :4], ids[0, 33] = 26000, 24001, 25, 23
    for split in ("train", "val"):
        write(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_1_leftImg8bit.png", np.zeros((21, 34, 3)))
        path = tmp_path / "gtFine" / split / "ulm" / "ulm_0_1_gtFine_instanceIds.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(ids).save(path)
    data = DATA | {"name": "cityscapes_instance", "root": str(tmp_path), "augment": {"crop": 16}}
    train, val = open_maps(data, RULE, "instance", as_masks=True)
    assert val.classes == ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    masks, labels, crowd = val.segments(0)
    assert (labels.tolist(), crowd.tolist()) == ([1, 0, 2], [True, False, False])
    assert torch.equal(torch.as_tensor(masks[2]).bool(), torch.from_numpy(ids == 26000))
    instances = val.records[0].instances
    assert (instances.boxes[2].tolist(), instances.areas.tolist()) == ([3, 2, 9, 5], [24, 20, 18])
    torch.manual_seed(0)
    assert set(train[0][1]["labels"].tolist()) <= {0, 2}, "crowds aren't trained on"
    ids[0, 0] = 34001
    Image.fromarray(ids).save(path)
    with pytest.raises(TaskError, match=r"1 label map with unknown values .* ids that stand for no class: 34001"):
        open_maps(data, RULE, "instance", as_masks=True)
    path.unlink()
    with pytest.raises(TaskError, match="1 image without a label map"):
        open_maps(data, RULE, "instance", as_masks=True)


@pytest.mark.parametrize("converted", [False, True])
def test_coco_stuff_has_171_of_182_ids(tmp_path, converted):
    """mmseg's converter numbers the classes anew; 11 ids of things are in no map of the release."""
    missing = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    values = range(171) if converted else [value for value in range(182) if value not in missing]
    maps, suffix = ("annotations", "_labelTrainIds") if converted else ("stuffthingmaps", "")
    image = np.zeros((4, 172, 3))
    for part in ("train2017", "val2017"):
        write(tmp_path / ("images" if converted else ".") / part / "000000000139.jpg", image)
        write(tmp_path / maps / part / f"000000000139{suffix}.png", labels_of([*values, 255], (4, 172)))
    data = DATA | {"name": "coco_stuff", "root": str(tmp_path), "augment": {"crop": 16}}
    _, val = open_maps(data, RULE)
    assert (len(val.classes), val.classes[79], val.classes[80], val.classes[170]) == (
        171,
        "toothbrush",
        "banner",
        "wood",
    )
    assert val[0][1][0].tolist() == [*range(171), IGNORE]
    write(tmp_path / maps / "val2017" / f"000000000139{suffix}.png", labels_of([200 if converted else 11], (4, 172)))
    with pytest.raises(TaskError, match="1 label map with unknown values"):
        open_maps(data, RULE)
    (tmp_path / maps).rename(tmp_path / "elsewhere")
    with pytest.raises(TaskError, match="neither annotations/train2017 nor stuffthingmaps/train2017"):
        open_maps(data, RULE)


def test_what_is_measured_may_stand_for_what_is_trained_on(tmp_path):
    write(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_0_1_leftImg8bit.png", np.zeros((21, 34, 3)))
    write(tmp_path / "gtFine" / "val" / "ulm" / "ulm_0_1_gtFine_labelIds.png", labels_of(range(34)))
    data = DATA | {"name": "cityscapes", "root": str(tmp_path), "augment": {"crop": 16}}
    with pytest.raises(TaskError, match="leftImg8bit/train: no such folder"):
        open_maps(data, RULE)
    train, val = open_maps(data | {"train": data["val"]}, RULE)
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
    _, val = open_maps(DATA | {"name": "voc", "root": str(tmp_path), "augment": {"crop": 16}}, RULE)
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
    train, val = open_maps(panoptic[1], RULE, "panoptic", as_masks=True)
    assert train.things == [True, False]
    image, target = train[0]
    assert image.shape == (3, 24, 33)
    assert target["labels"].tolist() == [1, 0, 0]
    assert target["masks"].shape == (3, 24, 33)
    assert target["masks"].sum((1, 2)).tolist() == [200, 32, 40]
    truth = val[0][1]
    assert truth[6, 13].tolist() == [0, 2]
    assert truth[17, 25].tolist()[0] == truth[0, 30].tolist()[0] == 2
    _, val = open_maps(panoptic[1], RULE, "semantic")
    assert val[0][1].unique().tolist() == [0, 1, IGNORE]
    assert val[0][1][17, 25] == IGNORE


def test_segments_that_differ_from_their_picture_are_named(panoptic):
    root, data = panoptic
    write(root / "val" / "a.png", np.full((20, 33, 3), 1))
    with pytest.raises(TaskError, match=r"5 segments that differ from their picture \(.*val/a\.png: 65793 isn't in"):
        open_maps(data, RULE, "panoptic", as_masks=True)


@pytest.mark.parametrize(("task", "classes", "count"), [("semantic", 2, 2), ("panoptic", 2, 58), ("instance", 1, 57)])
def test_nuclei_for_every_task(task, classes, count):
    data = DATA | {"name": "nuclei", "augment": {"crop": 128}}
    train, val = open_maps(data, RULE, task, as_masks=True)
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
        open_maps(folder[1] | change, RULE, task)


def test_a_value_may_be_said_to_be_unlabelled(folder):
    root, data = folder
    for split in ("train", "val"):
        for index in range(2):
            write(root / "masks" / split / f"{index}.png", labels_of([0, 1, 2, 3]))
    train, _ = open_maps(data | {"unlabelled": (0,)}, RULE)
    assert np.unique(train.labels(0)).tolist() == [0, 1, 2, IGNORE]
    assert train.labels(0)[0, 0] == IGNORE
    train, _ = open_maps(data | {"unlabelled": (0, 2), "classes": ("b", "a"), "values": (3, 1)}, RULE)
    assert train.labels(0)[0, [0, 10, 20, 30]].tolist() == [IGNORE, 1, IGNORE, 0]
    write(root / "masks" / "val" / "1.png", labels_of([0, 255]))
    with pytest.raises(TaskError, match=r"1\.png has values that stand for no class: 255"):
        open_maps(data | {"unlabelled": (0,)}, RULE)
    for change, reason in (
        ({"unlabelled": (0,), "values": (0, 1, 2)}, "both hold 0"),
        ({"unlabelled": (-1,)}, r"data\.unlabelled takes different numbers"),
        ({"values": (1, 1, 2)}, r"data\.values takes different numbers"),
        ({"unlabelled": (0,), "name": "ade20k"}, r"data\.unlabelled is for label maps of data\.name=folder"),
    ):
        with pytest.raises(TaskError, match=reason):
            open_maps(data | change, RULE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("ciel\nforêt\nroute\n".encode("cp1252"), r"classes\.txt, line 2: is not text in UTF-8"),
        ("ciel\nforêt\nroute\n".encode("utf-16"), r"classes\.txt, line 1: is not text in UTF-8"),
        (b"sky\n\nroad\n", "class 2 of 3 has no name"),
        (b"sky\nsky\nroad\n", "names the class 'sky' twice"),
        (b"\n", "names no class"),
    ],
)
def test_a_list_of_classes_that_is_wrong_is_answered(folder, content, reason):
    (folder[0] / "classes.txt").write_bytes(content)
    with pytest.raises(TaskError, match=reason):
        open_maps(folder[1], RULE)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_list_of_classes_may_have_a_mark(folder, encoding):
    (folder[0] / "classes.txt").write_text("ciel\r\nforêt\r\nroute\r\n\r\n", encoding=encoding)
    assert open_maps(folder[1], RULE)[0].classes == ["ciel", "forêt", "route"]


def test_broken_label_maps_can_be_left_out(folder):
    root, data = folder
    write(root / "masks" / "train" / "0.png", labels_of([0, 7]))
    (root / "masks" / "val" / "1.png").unlink()
    with pytest.warns(UserWarning, match="1 label map with unknown values"):
        train, val = open_maps(data | {"broken": "drop"}, RULE)
    assert [[image.name for image, _ in part.files] for part in (train, val)] == [["1.jpg"], ["0.jpg"]]
    train[0], val[0]
    (root / "masks" / "val" / "0.png").unlink()
    with pytest.raises(TaskError, match=r"2 images without a label map .* without them no image is left"):
        open_maps(data | {"broken": "drop"}, RULE)


def test_a_photo_that_exif_turns_is_named_beside_its_label_map(folder):
    root, data = folder
    exif = Image.Exif()
    exif[0x0112] = 8
    path = root / "images" / "train" / "0.jpg"
    Image.fromarray(np.zeros((21, 34, 3), np.uint8)).save(path, exif=exif)
    with pytest.raises(TaskError, match=r"1 image that its EXIF entry turns .*0\.jpg is 34x21, 0\.png 21x34"):
        open_maps(data, RULE)
    path.write_bytes(b"no image")
    with pytest.raises(TaskError, match="1 damaged file"):
        open_maps(data, RULE)
    assert len(open_maps(data, RULE, skip_damaged=True)[0]) == 2


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_sizes_of_pictures_and_maps_are_compared_for_segments(panoptic, task):
    root, data = panoptic
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 33, 3), np.uint8)).save(root / "images" / "a.jpg", exif=exif)
    with pytest.raises(TaskError, match=r"EXIF entry turns .*a\.jpg is 33x20, annotated 20x33"):
        open_maps(data, RULE, task, as_masks=True)
    write(root / "images" / "a.jpg", np.zeros((20, 33, 3)))
    write(root / "train" / "a.png", np.zeros((33, 20, 3)))
    with pytest.raises(TaskError, match=r"1 mask of another size than its image .*a\.png is 33x20, not 20x33"):
        open_maps(data, RULE, task, as_masks=True)


def test_segments_that_are_left_out_become_void(panoptic):
    root, data = panoptic
    content = json.loads((root / "train.json").read_text())
    content["annotations"][0]["segments_info"][1]["category_id"] = 4
    (root / "train.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="1 unknown category"):
        train, _ = open_maps(data | {"broken": "drop"}, RULE, "panoptic", as_masks=True)
    assert train[0][1]["labels"].tolist() == [1, 0]
    assert (train.labels(0)[5:9, 12:20] == IGNORE).all()


def test_categories_of_segments_in_another_order_are_mapped_by_name(panoptic):
    root, data = panoptic
    content = json.loads((root / "val.json").read_text())
    content["categories"].reverse()
    (root / "val.json").write_text(json.dumps(content))
    train, val = open_maps(data, RULE, "panoptic", as_masks=True)
    assert val.classes == train.classes == ["cup", "sky"]
    assert val.things == [True, False]
    assert val.segments(0)[1].tolist() == train.segments(0)[1].tolist() == [1, 0, 0, 0]
    content["categories"][1]["isthing"] = 0
    (root / "val.json").write_text(json.dumps(content))
    with pytest.raises(TaskError, match="differ in isthing of cup"):
        open_maps(data, RULE, "panoptic", as_masks=True)


def test_voc_s_label_maps_have_the_classes_that_are_named(tmp_path):
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for part in ("train", "val"):
        (tmp_path / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("cell 1\n")
    write(tmp_path / "JPEGImages" / "cell 1.PNG", np.zeros((21, 34, 3)))
    write(tmp_path / "SegmentationClass" / "cell 1.png", labels_of([0, 1, 2, 255]))
    data = DATA | {"name": "voc", "root": str(tmp_path), "augment": {"crop": 16}}
    with pytest.warns(UserWarning, match=r"taken for Pascal's, .* data\.classes"):
        open_maps(data, RULE)
    train, _ = open_maps(data | {"classes": ("cell", "debris")}, RULE)
    assert train.classes == ["background", "cell", "debris"]
    assert np.unique(train.labels(0)).tolist() == [0, 1, 2, IGNORE]
    with pytest.raises(TaskError, match="values that stand for no class: 2"):
        open_maps(data | {"classes": ("cell",)}, RULE)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "cell 1.xml").write_text("<annotation><object><name>cell</name></object></annotation>")
    with pytest.raises(TaskError, match=r"other classes than Pascal: cell; name yours, .* with data\.classes"):
        open_maps(data, RULE)
    assert open_maps(data | {"classes": ("cell", "debris")}, RULE)[0].classes[1] == "cell"


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "nuclei"])
def test_data_sets_with_classes_of_their_own_have_no_others(tmp_path, name):
    for part, split in (("training", "train"), ("validation", "val")):
        write(tmp_path / "images" / part / "a.jpg", np.zeros((21, 34, 3)))
        write(tmp_path / "annotations" / part / "a.png", labels_of([1]))
        write(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_1_leftImg8bit.png", np.zeros((21, 34, 3)))
        write(tmp_path / "gtFine" / split / "ulm" / "ulm_0_1_gtFine_labelIds.png", labels_of([7]))
    data = DATA | {"name": name, "root": str(tmp_path), "augment": {"crop": 16}, "classes": ("a", "b")}
    with pytest.raises(TaskError, match=rf"data\.classes is \['a', 'b'\], but {name} has"):
        open_maps(data, RULE)


def test_linked_folders_of_images_are_followed(folder, tmp_path_factory):
    root, data = folder
    for kind in ("images", "masks"):
        away = tmp_path_factory.mktemp(kind)
        (root / kind / "train").rename(away / "more")
        (root / kind / "train").mkdir()
        (root / kind / "train" / "link").symlink_to(away / "more", target_is_directory=True)
    write(root / "images" / "train" / ".ipynb_checkpoints" / "0.jpg", np.zeros((21, 34, 3)))
    assert len(open_maps(data, RULE)[0]) == 2
