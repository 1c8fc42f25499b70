import json

import numpy as np
import pytest
from foveate.tasks import TaskError
from foveate.tasks.data.coco import (
    decode_masks,
    encode_mask,
    mask_box,
    read_instances,
    read_panoptic,
    read_segment_ids,
    to_run_lengths,
)
from PIL import Image


@pytest.fixture
def coco(tmp_path):
    """A file of two images, 30x41 pixels, with a polygon, run lengths and a crowd; returns its content and a writer."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((30, 41, 3), np.uint8)).save(tmp_path / name)
    mask = np.zeros((30, 41), np.uint8)
    mask[5:9, 10:20] = 1
    runs = encode_mask(mask)
    content = {
        "images": [
            {"id": 5, "file_name": "a.png", "height": 30, "width": 41},
            {"id": 3, "file_name": "b.png", "height": 30, "width": 41},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 5,
                "category_id": 90,
                "bbox": [2, 3, 10, 5],
                "area": 50,
                "iscrowd": 0,
                "segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]],
            },
            {
                "id": 2,
                "image_id": 5,
                "category_id": 7,
                "bbox": [10, 5, 10, 4],
                "area": 40,
                "iscrowd": 1,
                "segmentation": {"size": [30, 41], "counts": runs["counts"].decode()},
            },
        ],
    }

    def write():
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return path

    return content, write


def test_objects_are_read_with_boxes_labels_and_masks(coco, tmp_path):
    records, classes, categories = read_instances(coco[1](), tmp_path)
    assert (classes, categories) == (["cat", "dog"], [7, 90])
    assert [record.id for record in records] == [5, 3]
    assert len(records[1].instances) == 0
    objects = records[0].instances
    assert objects.boxes.tolist() == [[2, 3, 12, 8], [10, 5, 20, 9]]
    assert objects.labels.tolist() == [1, 0]
    assert objects.crowd.tolist() == [False, True]
    masks = decode_masks(objects.masks, 30, 41)
    assert masks.sum((1, 2)).tolist() == [50, 40]
    assert [mask_box(mask) for mask in masks] == [(2, 3, 12, 8), (10, 5, 20, 9)]


def test_run_lengths_in_both_forms_are_the_same_mask():
    mask = np.zeros((7, 5), np.uint8)
    mask[2:5, 1:3] = 1
    plain = {"size": [7, 5], "counts": [9, 3, 4, 3, 16]}
    assert to_run_lengths(plain, 7, 5)["counts"] == encode_mask(mask)["counts"]
    np.testing.assert_array_equal(decode_masks([plain], 7, 5)[0], mask)


def test_all_faults_are_listed_in_one_line_with_counts(coco, tmp_path):
    content, write = coco
    good = content["annotations"][0]
    content["images"].append({"id": 8, "file_name": "gone.png", "height": 9, "width": 9})
    content["annotations"] += [
        good | {"id": 1},
        good | {"id": 10, "category_id": 4},
        good | {"id": 11, "category_id": 5},
        good | {"id": 12, "bbox": [35, 3, 10, 5]},
        good | {"id": 13, "segmentation": []},
        good | {"id": 14, "segmentation": [[1, 2, 3, 4]]},
        good | {"id": 15, "image_id": 77},
        good | {"id": 16, "bbox": [1, 2, float("nan"), 4]},
        good | {"id": 17, "segmentation": {"size": [4, 4], "counts": "04"}},
    ]
    with pytest.raises(TaskError) as caught:
        read_instances(write(), tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        f"1 missing image ({tmp_path}/gone.png)",
        "2 unknown categories (annotation 10: 4, annotation 11: 5)",
        "1 box outside its image (annotation 12)",
        "2 empty polygons (annotation 13, annotation 14)",
        "1 annotation of an unknown image (annotation 15)",
        "1 duplicate id (annotation 1)",
        "(annotation 16)",
        "1 mask of another size than its image (annotation 17)",
        "data.broken=drop",
    ):
        assert part in message
    with pytest.warns(UserWarning, match="2 unknown categories"):
        records, _, _ = read_instances(write(), tmp_path, broken="drop")
    assert [len(record.instances) for record in records] == [2, 0]


def test_boxes_that_leave_the_image_by_rounding_are_clipped_and_empty_ones_left_out(coco, tmp_path):
    content, write = coco
    good = content["annotations"][0]
    content["annotations"] = [good | {"bbox": [31.5, -0.4, 10.2, 5]}, good | {"id": 3, "bbox": [4, 4, 0, 5]}]
    records, _, _ = read_instances(write(), tmp_path)
    assert records[0].instances.boxes.tolist() == [[31.5, 0, 41, 4.6]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "can't be read as JSON"), ("[]", "no list of images"), ('{"images": []}', "no list of annotations")],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, reason):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(TaskError, match=reason):
        read_instances(tmp_path / "x.json", tmp_path)


@pytest.fixture
def panoptic(tmp_path):
    ids = np.zeros((20, 33), np.int64)
    ids[:, :10], ids[5:9, 12:30] = 300, 70000
    (tmp_path / "panoptic").mkdir()
    picture = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "panoptic" / "a.png")
    Image.fromarray(np.zeros((20, 33, 3), np.uint8)).save(tmp_path / "a.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 20, "width": 33}],
        "categories": [{"id": 1, "name": "cup", "isthing": 1}, {"id": 200, "name": "sky", "isthing": 0}],
        "annotations": [
            {
                "image_id": 1,
                "file_name": "a.png",
                "segments_info": [{"id": 300, "category_id": 200}, {"id": 70000, "category_id": 1, "iscrowd": 1}],
            }
        ],
    }
    return content, tmp_path, ids


def test_panoptic_segments_are_read(panoptic):
    content, folder, ids = panoptic
    (folder / "panoptic.json").write_text(json.dumps(content))
    (record,), classes, things = read_panoptic(folder / "panoptic.json", folder)
    assert (classes, things) == (["cup", "sky"], [True, False])
    assert record.labels.tolist() == [1, 0]
    assert record.crowd.tolist() == [False, True]
    np.testing.assert_array_equal(read_segment_ids(np.asarray(Image.open(record.map))), ids)


def test_faults_of_panoptic_annotations_are_listed(panoptic):
    content, folder, _ = panoptic
    content["images"].append({"id": 2, "file_name": "b.jpg", "height": 20, "width": 33})
    content["annotations"][0]["segments_info"].append({"id": 300, "category_id": 9})
    content["annotations"].append({"image_id": 9, "file_name": "z.png", "segments_info": []})
    (folder / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(TaskError) as caught:
        read_panoptic(folder / "panoptic.json", folder)
    for part in ("1 image without a label map (b.jpg)", "1 unknown category", "1 annotation of an unknown image"):
        assert part in str(caught.value)


def test_a_file_of_which_nothing_is_left_is_refused_though_faults_may_be_left_out(coco, panoptic, tmp_path):
    content, write = coco
    for image in content["images"]:
        image["height"] = "30"
    with pytest.raises(TaskError, match=r"2 missing or malformed entries .* correct the file"):
        read_instances(write(), tmp_path, broken="drop")
    content, folder, _ = panoptic
    content["annotations"][0]["segments_info"] = None
    (folder / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(TaskError, match="without them no image is left"):
        read_panoptic(folder / "panoptic.json", folder, broken="drop")


EXPORTS = {
    "cvat": (["", ""], [{"id": 1, "name": "cat", "supercategory": ""}, {"id": 2, "name": "dog", "supercategory": ""}]),
    "label studio": (
        ["images\\", "/data/upload/1/"],
        [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    ),
    "roboflow": (
        ["", ""],
        [
            {"id": 0, "name": "pets", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "pets"},
            {"id": 2, "name": "dog", "supercategory": "pets"},
        ],
    ),
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_exports_of_other_tools_are_read_as_they_are(tool, tmp_path):
    """Folders of their own in names, ids from 0, a heading category, no polygon of a box, an image without objects."""
    folders, categories = EXPORTS[tool]
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png" if tool == "cvat" else "b.png"):
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / name)
    names = [f"{folders[0]}a.png", f"{folders[1]}{'sub/' if tool == 'cvat' else ''}b.png"]
    images = [{"id": key, "file_name": name, "height": 30, "width": 40, "license": 0} for key, name in enumerate(names)]
    last = categories[-1]["id"]
    objects = [{"id": 0, "image_id": 1, "category_id": last, "bbox": [1, 2, 10.5, 20], "segmentation": [], "ignore": 0}]
    content = {"images": images, "annotations": objects, "categories": categories, "info": {}}
    (tmp_path / "export.json").write_text(json.dumps(content))
    records, classes, ids = read_instances(tmp_path / "export.json", tmp_path, with_masks=False)
    assert classes == ["cat", "dog"]
    assert ids == [category["id"] for category in categories[-2:]]
    assert [len(record.instances) for record in records] == [0, 1]
    assert records[1].file.name == "b.png"
    assert records[1].instances.labels.tolist() == [1]
    assert records[1].instances.areas.tolist() == [210]
    with pytest.raises(TaskError, match=r"1 empty polygon \(annotation 0\)"):
        read_instances(tmp_path / "export.json", tmp_path)


def test_a_name_without_its_folders_counts_only_where_it_is_of_one_image(tmp_path):
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    images = [{"id": key, "file_name": f"{key}/a.png", "height": 30, "width": 40} for key in range(2)]
    content = {"images": images, "annotations": [], "categories": [{"id": 0, "name": "cat"}]}
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(TaskError, match=r"2 missing images"):
        read_instances(tmp_path / "export.json", tmp_path)
