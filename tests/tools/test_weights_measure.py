"""`foveate weights verify --data` of detectors and segmenters: the recipe's test, beside the authors' numbers."""

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace

import foveate
import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from foveate.tasks import TaskError, engine
from foveate.tasks.data.coco import decode_masks
from foveate.tasks.predictors import load_published
from foveate.tools.cli import main
from foveate.tools.weights.measure import measure_dense
from foveate.zoo import weights
from PIL import Image

DETECTOR = "quadtree_b0.tang_mask_rcnn_coco_1x"
SEGMENTER = "quadtree_b0.tang_semantic_fpn_ade20k_160k"
# Widths of published heads and narrower ones; the hidden layers see maps of 7 x 7.
NARROW = {256: 16, 128: 24, 1024: 32, 12544: 16 * 49}


@pytest.fixture
def publish(open_fixture, tmp_path, monkeypatch):
    """Put a file of QuadTree-B0 and a published head, which are narrower and random, where its name is looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FOVEATE_WEIGHTS_MIRROR", str(tmp_path / "mirror"))

    def save(name: str, heads: str) -> Path:
        backbone, heads = open_fixture("quadtree/quadtree_b0_dense_256x320"), open_fixture(heads)
        state = {f"backbone.{key}": value for key, value in backbone.state().items()}
        channels = [output["shape"][1] for output in backbone.spec["outputs"].values()]
        for key, (out, *shape) in heads.spec["state"].items():
            shape = [NARROW.get(size, size) for size in shape]
            if "lateral_convs" in key and shape:
                shape[0] = channels[int(key.split(".")[2])]
            state[key] = heads.golden.tensor_for(key, (NARROW.get(out, out), *shape))
        path = tmp_path / "mirror" / name / weights.find(name).sources[0].name
        path.parent.mkdir(parents=True)
        torch.save({"meta": {}, "state_dict": state}, path)
        return path

    return save


def noise(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    """Write images of these heights and widths."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def entry_of(image: int, found: dict, index: int, **keys) -> dict:
    """A detection as COCO's JSON has it; the labels' ids are neither from 0 nor without gaps."""
    left, top, right, bottom = found["boxes"][index].double().tolist()
    mask = found["masks"][index]
    return {
        "image_id": image,
        "category_id": 3 * int(found["labels"][index]) + 5,
        "bbox": [left, top, right - left, bottom - top],
        "segmentation": {"size": list(mask["size"]), "counts": mask["counts"].decode()},
        **keys,
    }


def coco_folder(root: Path, found: list[dict], paths: list[Path], classes: int = 80) -> Path:
    """Write COCO's annotations of objects that are some of those found, with boxes a bit off."""
    images, annotations = [], []
    for image, (path, objects) in enumerate(zip(paths, found, strict=True)):
        width, height = Image.open(path).size
        images.append({"id": image, "file_name": path.name, "height": height, "width": width})
        whole = [index for index, mask in enumerate(objects["masks"]) if decode_masks([mask], height, width).sum() > 8]
        for index in whole[::3]:
            entry = entry_of(image, objects, index, id=len(annotations) + 1, iscrowd=0)
            entry["bbox"][2] *= 0.83
            annotations.append(entry | {"area": entry["bbox"][2] * entry["bbox"][3]})
    categories = [{"id": 3 * label + 5, "name": f"c{label}"} for label in range(classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / "instances_val2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco_eval(path: Path, found: list[dict], kind: str) -> float:
    """COCO's own evaluation of what was found, in percent."""
    detections = [
        entry_of(image, objects, index, score=float(objects["scores"][index]))
        for image, objects in enumerate(found)
        for index in range(len(objects["scores"]))
    ]
    if kind == "bbox":
        detections = [{key: value for key, value in entry.items() if key != "segmentation"} for entry in detections]
    truth = COCO(str(path))
    evaluation = COCOeval_faster(truth, truth.loadRes(detections), kind)
    evaluation.run()
    return 100 * evaluation.stats[0]


def measured(text: str) -> dict[str, tuple[float, float, float]]:
    """Return, by the metric's name, what was measured, what the authors state and the difference."""
    number = r"([+-]?\d+(?:\.\d+)?)"
    rows = re.findall(rf"^measured   (.+) {number} on .*; its authors state {number}, {number}$", text, re.MULTILINE)
    return {name: tuple(map(float, values)) for name, *values in rows}


def test_a_detector_s_ap_is_coco_s(publish, tmp_path, capsys, refused):
    file = publish(DETECTOR, "dense/loss_maskrcnn_a")
    root = tmp_path / "coco"
    # Long ones, which are few pixels at the published 800 x 1333.
    paths = noise(root / "val2017", (10, 260), (8, 170))
    predictor = load_published(DETECTOR, weights=file)
    found = [predictor([Image.open(path)])[0] for path in paths]
    annotations = coco_folder(root, found, paths)
    expected = {"box AP": coco_eval(annotations, found, "bbox"), "mask AP": coco_eval(annotations, found, "segm")}
    assert all(1 < value < 99 for value in expected.values())

    command = ["weights", "verify", DETECTOR, "--images", str(paths[1]), "--workers", "0", "--data", str(root)]
    capsys.readouterr()
    assert main(command) == 0
    text = capsys.readouterr().out
    values = measured(text)
    assert list(values) == ["box AP", "mask AP"]
    for name, stated in (("box AP", 38.8), ("mask AP", 36.5)):
        assert values[name] == pytest.approx((expected[name], stated, expected[name] - stated), abs=0.011)
    assert f"on 2 images of {root}" in text
    assert re.search(r"photo      1\.png: .+%.* at ", text)

    coco_folder(root, found, paths, classes=79)
    assert f"num_classes is 80, but {root} has 79 classes" in refused(*command)
    annotations.unlink()
    assert f"{annotations}: no such file" in refused(*command)


def test_a_segmenter_s_miou_is_that_of_its_labels(publish, tmp_path, capsys, refused):
    file = publish(SEGMENTER, "dense/semfpn_a_150")
    root = tmp_path / "ADEChallengeData2016"
    (path,) = noise(root / "images" / "validation", (5, 170))
    predictor = load_published(SEGMENTER, weights=file)
    found = predictor([Image.open(path)])[0].numpy()
    # A part is another class, a part unlabelled: in the files, classes count from 1.
    truth = found.copy()
    truth[:, :40], truth[:1] = 7, 255
    folder = root / "annotations" / "validation"
    folder.mkdir(parents=True)
    Image.fromarray(np.where(truth == 255, 0, truth + 1).astype(np.uint8)).save(folder / path.name)
    labels, known = np.union1d(found[1:], truth[1:]), truth != 255
    shares = [
        ((found == label) & (truth == label)).sum() / (((found == label) | (truth == label)) & known).sum()
        for label in labels
    ]
    expected = 100 * np.mean(shares)
    assert 1 < expected < 99

    options = ["--images", str(path), "--workers", "0", "--data", str(root)]
    capsys.readouterr()
    assert main(["weights", "verify", SEGMENTER, *options]) == 0
    text = capsys.readouterr().out
    assert measured(text) == {"mIoU": pytest.approx((expected, 39.9, expected - 39.9), abs=0.011)}
    assert f"photo      0.png: {predictor.headline(torch.from_numpy(found))}" in text

    # The file alone, without a name in the table, is measured too, but nothing is known of its authors' number.
    assert main(["weights", "verify", str(file), "--model", "quadtree_b0", *options]) == 0
    assert re.search(rf"^measured   mIoU {expected:.2f} on 1 images of \S+$", capsys.readouterr().out, re.MULTILINE)

    folder.rename(root / "annotations" / "training")
    assert "1 image without a label map" in refused("weights", "verify", SEGMENTER, *options)


def test_a_file_of_other_classes_is_not_measured(publish, tmp_path, refused):
    publish(SEGMENTER, "dense/semfpn_a_19")
    photo, *_ = noise(tmp_path / "images" / "validation", (5, 170))
    folder = tmp_path / "annotations" / "validation"
    folder.mkdir(parents=True)
    labels = np.ones((5, 170), np.uint8)
    labels[:, 85:] = 2
    Image.fromarray(labels).save(folder / "0.png")
    options = ["--images", str(photo), "--workers", "0", "--data", str(tmp_path)]
    assert "has 19 classes, the data 150" in refused("weights", "verify", SEGMENTER, *options)


def test_without_data_the_stated_numbers_are_shown(publish, tmp_path, capsys):
    publish(SEGMENTER, "dense/semfpn_a_150")
    paths = noise(tmp_path / "photos", (5, 170))
    assert main(["weights", "verify", SEGMENTER, "--images", str(paths[0])]) == 0
    text = capsys.readouterr().out
    assert "photo      0.png: " in text
    assert text.endswith("stated     mIoU 39.9; give --data FOLDER to measure it\n")


# What the engine measures of a detector with masks, and of a segmenter by its task.
ENGINE = {
    "detect": ("box_ap", "mask_ap"),
    "semantic": ("miou", "macc"),
    "instance": ("mask_ap",),
    "panoptic": ("pq", "pq_things", "pq_stuff"),
}


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_every_published_file_is_tested_by_its_own_recipe(task, tmp_path, monkeypatch, capsys):
    """Of the head, backbone and data that the table names; at several scales where no other number is stated."""
    tested, refused = [], []

    def evaluate(config):
        tested.append(config)
        return dict.fromkeys(ENGINE[config["model"].get("output", "detect")], 0.5), [], []

    monkeypatch.setattr(engine, "evaluate", evaluate)
    args = argparse.Namespace(data=tmp_path, batch_size=None, workers=0, device="cpu")
    for entry in (entry for entry in weights.table().values() if entry.task == task):
        path = tmp_path / entry.name
        file = SimpleNamespace(entry=entry, path=path, checkpoint=path)
        contents = SimpleNamespace(file=file, task=task, name=entry.model, head=entry.head)
        try:
            measure_dense(contents, args)
        except TaskError as error:
            refused.append((entry.name, str(error)))
            continue
        config = tested[-1]
        model, data = config["model"], config["data"]
        backbone = model["backbone"].partition(".")[0]
        assert (model["head"], backbone, model["checkpoint"]) == (entry.head, entry.model, path)
        assert not model["pretrained"]
        assert model["backbone_checkpoint"] is None
        assert (config["batch_size"], config["precision"], data["root"]) == (1, "float32", str(tmp_path))
        assert data["train"] == data["val"]
        parts = (f"{entry.data}_panoptic", f"{entry.data}_instance")
        assert data["name"] == entry.data or {data["name"], model["setting"]} & {*parts}
        several = list(entry.stated) == ["mIoU multi-scale"]
        if task == "segment":
            assert (len(config["test"]["scales"]), config["test"]["flip"]) == ((6, True) if several else (1, False))
        text = capsys.readouterr().out
        single = [name for name in entry.stated if several or name != "mIoU multi-scale"]
        assert list(measured(text)) == (["PQ"] if "panoptic" in entry.name else single)
        assert (len(single) < len(entry.stated) or "panoptic" in entry.name) == ("not measured" in text)
    # OneFormer, the decoders tried on VAN, and what others trained on
    # timm's own backbones have no recipe.
    rows = (weights.table()[name] for name, _ in refused)
    ours = [row.name for row in rows if row.model in foveate.list_models() and row.state != "shipped"]
    assert sum(not name.startswith("van_") for name in ours) == {"detect": 0, "segment": 8}[task]
    assert all("_ham_" in name for name in ours if name.startswith("van_"))
    assert all(f"no recipe tells how {name} is tested" in message for name, message in refused)
