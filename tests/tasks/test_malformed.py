"""Whatever form annotations have, they are read, or answered before training with their id in one line."""

import copy
import io
import itertools
import json
import tarfile
import warnings

import numpy as np
import pytest
import timm
import torch
from foveate.tasks import TaskError
from foveate.tasks.data.coco import encode_mask
from foveate.tasks.data.formats import open_maps as build_segmentation
from foveate.tasks.data.formats import open_objects as build_detection
from foveate.tasks.data.segmentation import InputRule
from foveate.tasks.detect import Task as Detect
from foveate.tasks.segment import Task as Segment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

RULE = InputRule(None, 1, 1, (0.5,) * 3, (0.5,) * 3)
SIZE = (30, 41)
GONE = object()
RUNS = encode_mask(np.pad(np.ones((4, 10), np.uint8), ((5, 21), (10, 21))))["counts"].decode()
FAR = [[100.0, 100, 120, 100, 120, 120]]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def good_instances():
    """Two images with a polygon, compressed run lengths of a crowd, and plain ones."""
    polygon = [[2, 3, 12, 3, 12, 8, 2, 8]]
    plain = [30 * 10 + 5, 4, 26, 4, 30 * 41 - 30 * 10 - 39]
    objects = [
        (5, 90, [2, 3, 10, 5], 50, 0, polygon),
        (5, 7, [10, 5, 10, 4], 40, 1, {"size": [*SIZE], "counts": RUNS}),
        (3, 7, [10, 5, 2, 4], 8, 0, {"size": [*SIZE], "counts": plain}),
    ]
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    return {
        "images": [
            {"id": 5, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]},
            {"id": 3, "file_name": "b.png", "height": SIZE[0], "width": SIZE[1]},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [
            {"id": number} | dict(zip(keys, values, strict=True)) for number, values in enumerate(objects, start=11)
        ],
    }


def good_panoptic():
    segments = [{"id": 300, "category_id": 200}, {"id": 70000, "category_id": 1, "iscrowd": 0}]
    return {
        "images": [
            {"id": 5, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]},
            {"id": 3, "file_name": "b.png", "height": SIZE[0], "width": SIZE[1]},
        ],
        "categories": [{"id": 1, "name": "cup", "isthing": 1}, {"id": 200, "name": "sky", "isthing": 0}],
        "annotations": [
            {"image_id": key, "file_name": f"{name}.png", "segments_info": copy.deepcopy(segments)}
            for key, name in ((5, "a"), (3, "b"))
        ],
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    ids = np.full(SIZE, 300)
    ids[5:9, 12:30] = 70000
    for name in ("a.png", "b.png"):
        save(root / "images" / name, np.zeros((*SIZE, 3)))
        save(root / "maps" / name, np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1))
    return root


def readers(root, kind, broken):
    """Yield for every task a function that reads a file's every sample, to train on and to be measured by."""
    part = {"annotations": "changed.json", "images": "images", "maps": "maps", "split": "train"}
    changes = {"root": str(root), "broken": broken, "augment": {"crop": 20}, "train": part, "val": part}
    detect, segment = Detect.DEFAULTS["data"] | changes, Segment.DEFAULTS["data"] | changes
    if kind == "instances":
        for with_masks in (True, False):
            yield lambda with_masks=with_masks: build_detection(detect, with_masks)
        yield lambda: build_segmentation(segment | {"name": "coco"}, RULE, "instance", True)
    else:
        for task in ("panoptic", "semantic"):
            yield lambda task=task: build_segmentation(
                segment | {"name": "coco_panoptic"}, RULE, task, as_masks=task == "panoptic"
            )


def read_all(root, kind, content, broken="refuse"):
    """Read all samples of all tasks; return the refusals. Anything but a refusal before the first sample is raised."""
    (root / "changed.json").write_text(json.dumps(content))
    messages = []
    for build in readers(root, kind, broken):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                sets = build()
            except TaskError as error:
                messages.append(str(error))
                assert "\n" not in messages[-1]
                assert len(messages[-1]) < 2000
                continue
            for dataset in sets:
                items = [dataset[index] for index in range(len(dataset))]
                dataset.collate(items)
                for item in items:
                    boxes = item[1].get("boxes", np.zeros(1)) if isinstance(item[1], dict) else np.zeros(1)
                    assert np.isfinite(np.asarray(boxes)).all()
    return messages


def change(content, path, value):
    content = copy.deepcopy(content)
    node = content
    for key in path[:-1]:
        node = node[key]
    if value is GONE:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return content


def instance(**changes):
    return ("instances", lambda content: content["annotations"][0].update(changes))


def image(**changes):
    return ("instances", lambda content: content["images"][0].update(changes))


def runs(counts, **changes):
    return instance(segmentation={"size": [*SIZE], "counts": counts, **changes})


def without(kind, *path):
    def cut(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return kind, cut


def panoptic(*path, **changes):
    def put(content):
        for key in path:
            content = content[key]
        content.update(changes)

    return "panoptic", put


FORMS = {
    "no height": (without("instances", "images", 0, "height"), "missing or malformed entry (image 5: no height)"),
    "null width": (image(width=None), "image 5: width None"),
    "height in a string": (image(height="30"), "image 5: height '30'"),
    "negative height": (image(height=-30), "image 5: height -30"),
    "fraction of a width": (image(width=40.5), "image 5: width 40.5"),
    "no file name": (without("instances", "images", 0, "file_name"), "image 5: no file_name"),
    "null file name": (image(file_name=None), "image 5: file_name None"),
    "name that leads out": (
        image(file_name="../maps/b.png"),
        "1 file name that leads out of its folder ('../",
    ),
    "name of a root": (image(file_name="/etc/hostname"), "1 file name that leads out of its folder ('/etc/hostname')"),
    "name no file can have": (image(file_name="a" * 5000), "1 missing image"),
    "name with a zero byte": (image(file_name="a\0.png"), "1 missing image"),
    "list as an id": (image(id=[1]), "image 1 of the list: id [1]"),
    "image that is a string": (
        ("instances", lambda content: content["images"].append("x")),
        "image 3 of the list: 'x'",
    ),
    "no category name": (without("instances", "categories", 1, "name"), "category 90: no name"),
    "null category name": (
        ("instances", lambda content: content["categories"][1].update(name=None)),
        "category 90: name None",
    ),
    "null area": (instance(area=None), "annotation 11: area None"),
    "area in a string": (instance(area="50"), "annotation 11: area '50'"),
    "negative area": (instance(area=-1), "annotation 11: area -1"),
    "crowd in a string": (instance(iscrowd="0"), "annotation 11: iscrowd '0'"),
    "null crowd": (instance(iscrowd=None), "annotation 11: iscrowd None"),
    "flat polygon": (instance(segmentation=[2, 3, 12, 3, 12, 8]), "1 malformed mask (annotation 11: a polygon is"),
    "polygon of pairs": (instance(segmentation=[[[2, 3], [12, 3], [12, 8]]]), "1 malformed mask (annotation 11"),
    "ragged polygon": (instance(segmentation=[[[2, 3], [12], [12, 8]]]), "1 malformed mask (annotation 11"),
    "odd polygon": (instance(segmentation=[[2, 3, 12, 3, 12, 8, 4]]), "1 malformed mask (annotation 11"),
    "null coordinate": (instance(segmentation=[[2, None, 12, 3, 12, 8]]), "1 malformed mask (annotation 11"),
    "coordinate in a string": (instance(segmentation=[[2, "3", 12, 3, 12, 8]]), "1 malformed mask (annotation 11"),
    "NaN in a polygon": (instance(segmentation=[[2, float("nan"), 12, 3, 12, 8]]), "1 malformed mask (annotation 11"),
    "polygon in a string": (instance(segmentation="2 3 12 3"), "1 malformed mask (annotation 11"),
    "polygon outside": (instance(segmentation=FAR), "1 polygon outside its image (annotation 11)"),
    "polygon above": (
        instance(segmentation=[[2, -20, 12, -20, 12, -9]]),
        "1 polygon outside its image (annotation 11)",
    ),
    "huge polygon": (instance(segmentation=[[2, 3, 1e15, 3, 12, 8]]), "1 polygon outside its image (annotation 11)"),
    "null mask": (instance(segmentation=None), "1 empty polygon (annotation 11)"),
    "null box": (instance(bbox=None), "box that isn't four numbers"),
    "null coordinate of a box": (instance(bbox=[1, 2, None, 4]), "box that isn't four numbers"),
    "box beyond floats": (instance(bbox=[10**400, 2, 3, 4]), "box that isn't four numbers"),
    "runs too short": (runs([5, 4, 9]), "annotation 11: its run lengths add up to 18, not 1230"),
    "runs too long": (runs([5, 4, 1300]), "annotation 11: its run lengths"),
    "negative run": (runs([-5, 1235]), "annotation 11: its run lengths"),
    "null run": (runs([5, None, 1225]), "annotation 11: its run lengths"),
    "run in a string": (runs(["5", 1225]), "annotation 11: its run lengths"),
    "no runs": (instance(segmentation={"size": [*SIZE]}), "annotation 11: its run lengths"),
    "compressed runs too short": (runs("04"), "annotation 11: its run lengths add up to 4, not 1230"),
    "compressed runs cut": (runs("ooooo"), "annotation 11: its run lengths can't be read"),
    "compressed runs of other characters": (runs("é!"), "annotation 11: its run lengths can't be read"),
    "no size of runs": (instance(segmentation={"counts": [1230]}), "1 mask of another size than its image"),
    "size of runs in a string": (runs([1230], size="30x41"), "1 mask of another size than its image"),
    "null category": (instance(category_id=None), "1 unknown category (annotation 11: None)"),
    "list as a category": (instance(category_id=[7]), "1 unknown category (annotation 11: [7])"),
    "null image": (instance(image_id=None), "1 annotation of an unknown image (annotation 11)"),
    "annotation that is null": (
        ("instances", lambda content: content["annotations"].append(None)),
        "annotation 4 of the list: None",
    ),
    "panoptic: no file name": (without("panoptic", "annotations", 0, "file_name"), "image 5: no file_name"),
    "panoptic: no height": (without("panoptic", "images", 0, "height"), "image 5: no height"),
    "panoptic: null segments": (panoptic("annotations", 0, segments_info=None), "image 5: segments_info None"),
    "panoptic: no segments": (without("panoptic", "annotations", 0, "segments_info"), "image 5: no segments_info"),
    "panoptic: no id": (without("panoptic", "annotations", 0, "segments_info", 0, "id"), "image 5: id None"),
    "panoptic: negative id": (panoptic("annotations", 0, "segments_info", 0, id=-3), "image 5: id -3"),
    "panoptic: string crowd": (
        panoptic("annotations", 0, "segments_info", 1, iscrowd="0"),
        "segment 70000 of image 5: iscrowd '0'",
    ),
    "panoptic: unknown category": (
        panoptic("annotations", 0, "segments_info", 1, category_id=4),
        "1 unknown category (segment 70000 of image 5: 4)",
    ),
    "panoptic: id that isn't painted": (panoptic("annotations", 0, "segments_info", 1, id=9), "9 has no pixel"),
    "panoptic: isthing in a string": (panoptic("categories", 0, isthing="0"), "category 1: isthing '0'"),
    "panoptic: null image": (panoptic("annotations", 0, image_id=None), "1 annotation of an unknown image"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_malformed_form_is_answered_before_training_and_can_be_left_out(root, form):
    (kind, spoil), expected = FORMS[form]
    content = {"instances": good_instances, "panoptic": good_panoptic}[kind]()
    spoil(content)
    messages = read_all(root, kind, content)
    of_masks = any(word in expected for word in ("mask", "polygon", "run lengths"))
    # Detectors of boxes alone don't look at masks.
    assert len(messages) == (2 if of_masks or kind == "panoptic" else 3)
    for message in messages:
        assert expected in message
        assert "data.broken=drop" in message
    assert not read_all(root, kind, content, "drop")


WILD = [GONE, None, "", "12", True, -1, 0.5, 1e30, 10**400, float("nan"), [], {"x": 1}, [None], [[1.0, 2.0]], "\ud800"]


def paths(node, prefix=()):
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


@pytest.mark.parametrize(("kind", "good"), [("instances", good_instances), ("panoptic", good_panoptic)])
@pytest.mark.parametrize("part", ["images", "categories", "annotations"])
def test_any_value_at_any_place_is_read_or_refused_with_its_place(root, kind, good, part):
    # The first of each list stands for the others.
    places = [path for path in paths({part: good()[part]}) if len(path) > 1 and (path[1] == 0 or len(path) == 2)]
    refused = 0
    for path, value in itertools.product(places, WILD):
        content = change(good(), path, value)
        messages = read_all(root, kind, content)
        refused += bool(messages)
        for message in messages:
            assert "changed.json" in message
        if messages:
            read_all(root, kind, content, "drop")
    assert refused > len(places)


@pytest.mark.parametrize(("kind", "good"), [("instances", good_instances), ("panoptic", good_panoptic)])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_several_values_at_once_are_read_or_refused(root, kind, good, draw):
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from(["id", "size", "counts"]), inner),
        max_leaves=9,
    )
    content = good()
    for _ in range(draw.draw(st.integers(1, 4))):
        places = [path for path in paths(content) if len(path) > 1]
        if places:
            content = change(content, draw.draw(st.sampled_from(places)), draw.draw(value | st.just(GONE)))
    read_all(root, kind, content)
    read_all(root, kind, content, "drop")


@pytest.mark.parametrize("strange", ["pretrained_cfg_overlay", "checkpoint", "checkpoint_path", "nested", "hub"])
def test_a_strangers_file_names_no_other(strange, tmp_path, monkeypatch):
    """What its card says it starts from is neither fetched nor opened."""
    from foveate.tasks.checkpoints import read_checkpoint, without_start
    from foveate.tasks.classify import Predictor
    from foveate.zoo import CheckpointError

    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("an address was asked"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("an address was looked up"))
    model, kwargs = "nat_atto", {"num_classes": 2}
    address = "http://203.0.113.1/x.pth"
    if strange == "hub":
        model = "hf-hub:somebody/something"
    elif strange == "nested":
        kwargs = {"backbone_kwargs": {"pretrained_cfg_overlay": {"url": address}, "depth": 2}}
        assert without_start(kwargs) == {"backbone_kwargs": {"depth": 2}}
        return
    else:
        kwargs = {strange: {"url": address} if "overlay" in strange else address, "pretrained": True}
    state = timm.create_model("nat_atto", num_classes=2).state_dict()
    card = {"task": "classify", "model": model, "kwargs": kwargs, "classes": ["a", "b"]}
    card["input"] = {"size": 32, "channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    card["input"] |= {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    torch.save({"card": card, "state_dict": state}, tmp_path / "stranger.pth")
    if strange == "hub":
        with pytest.raises(CheckpointError, match="names a model elsewhere"):
            read_checkpoint(tmp_path / "stranger.pth")
    else:
        assert Predictor.from_checkpoint(tmp_path / "stranger.pth").classes == ["a", "b"]


DEEP = "[" * 100_000


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc", "webdataset", "history", "reference"])
def test_what_is_nested_without_end_is_one_line(kind, tmp_path):
    from pathlib import Path

    from foveate.tasks.data import shards, voc, yolo
    from foveate.tasks.data.annotations import Faults
    from foveate.tasks.data.coco import read_json
    from foveate.tools.curves import read_history
    from foveate.tools.weights.verify import _compare

    file = tmp_path / {"yolo": "data.yaml", "voc": "Annotations/a.xml", "webdataset": "a.tar"}.get(kind, "file.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(DEEP.replace("[", "<a>") if kind == "voc" else DEEP)
    if kind == "webdataset":
        with tarfile.open(file, "w") as tar:
            for name, content in (("a.png", b""), ("a.json", DEEP.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    elif kind == "voc":
        faults = Faults(Path("VOC"))
        assert voc._read_tree(tmp_path, "a", faults) is None
        with pytest.raises(TaskError, match=r"Annotations/a\.xml"):
            faults.settle("refuse", "correct the file", 1)
        return
    read, reason = {
        "coco": (lambda: read_json(file, ()), "can't be read as JSON"),
        "yolo": (lambda: yolo.read_yaml(tmp_path), "can't be read as YAML"),
        "webdataset": (lambda: list(shards._read_shard(file, None)), r"a\.tar, a: its \.json can't be read"),
        "history": (lambda: read_history(file), "is no history of foveate train"),
        "reference": (lambda: _compare(None, file, "cpu"), "not a recorded output"),
    }[kind]
    with pytest.raises(TaskError, match=reason) as error:
        read()
    assert "\n" not in str(error.value)


def test_what_is_nested_without_end_says_nothing(tmp_path):
    from foveate.tasks.engine.lock import _describe
    from foveate.zoo.checkpoint import Checkpoint
    from foveate.zoo.published import settings_of

    (tmp_path / "lock.json").write_text(DEEP)
    assert _describe(tmp_path / "lock.json") == "another process is writing a run there"
    assert Checkpoint(tmp_path, {}, {"foveate": DEEP}).card is None
    assert settings_of(f"a = {DEEP}{']' * len(DEEP)}") == {}


@pytest.mark.parametrize("name", [rb"a\q.png", b"\xff.png", rb"\ud800.png"], ids=["escape", "no UTF-8", "half a pair"])
def test_a_name_that_json_does_not_have_is_told_as_it_is_written(name, tmp_path):
    from foveate.tasks.data.coco_layout import recognise

    entry = b'{"images": [{"id": 1, "file_name": "%s"}], "annotations": [], "categories": []}' % name
    (tmp_path / "train.json").write_bytes(entry)
    with pytest.raises(TaskError, match=r"train\.json: names the image '.*\.png.*', which is in none of") as error:
        recognise(tmp_path)
    assert "\n" not in str(error.value)
    str(error.value).encode()
