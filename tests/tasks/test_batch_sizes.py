"""What is printed of evaluations, validations and predictions doesn't depend on how many images are read at once."""

import json

import numpy as np
import pytest
from foveate.tasks import engine
from foveate.tools.cli import main
from PIL import Image

SIZES = [(40, 61), (33, 50), (64, 64), (61, 40), (64, 96), (40, 61), (33, 52), (50, 90), (64, 64)]
COMMON = {
    "epochs": 1,
    "batch_size": 3,
    "device": "cpu",
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup_iterations": 1},
}
BODY = {"backbone": "nat_atto", "backbone_kwargs": {"drop_path_rate": 0.0}}
SMALL_QUERIES = {"num_queries": 12, "dim": 32, "num_points": 128, "topk": 10}
SMALL_BOXES = {"channels": 32, "min_size": 64, "max_size": 100, "max_detections": 10}
DETECT = {
    "detect_boxes": {"head": "retinanet", "kwargs": SMALL_BOXES},
    "detect_masks": {"head": "mask_rcnn", "kwargs": {**SMALL_BOXES, "hidden": 32}},
}
SEGMENT = {
    "segment_instances": {"head": "mask2former", "output": "instance", "kwargs": SMALL_QUERIES},
    "segment_panoptic": {
        "head": "mask2former",
        "output": "panoptic",
        "kwargs": {**SMALL_QUERIES, "object_threshold": 0},
    },
    "segment_semantic": {"head": "upernet", "kwargs": {"channels": 16}},
}


def disc(draw, size):
    y, x = np.mgrid[: size[0], : size[1]]
    center, radius = draw.uniform(0.3, 0.7, 2) * size, draw.uniform(8, 16)
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of many sizes with a bright disc each, as COCO's instances, its panoptic segments, masks and classes."""
    root, draw = tmp_path_factory.mktemp("discs"), np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("images", "masks", "panoptic"):
            (root / folder / split).mkdir(parents=True)
        images, objects, segments = [], [], []
        for index, size in enumerate(SIZES):
            mask, name = disc(draw, np.array(size)), f"{index}.png"
            pixels = (draw.integers(0, 120, (*size, 3)) + 130 * mask[..., None]).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / name)
            Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / split / name)
            ids = np.stack([1 + mask, 0 * mask, 0 * mask], -1).astype(np.uint8)
            Image.fromarray(ids).save(root / "panoptic" / split / name)
            (root / "sorted" / split / str(index % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "sorted" / split / str(index % 2) / name)
            images.append({"id": index, "file_name": name, "height": size[0], "width": size[1]})
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask.T.ravel(), [2]]).astype(int))))
            runs = runs.tolist() if not mask[0, 0] else [0, *runs.tolist()]
            objects.append(
                {
                    "id": index + 1,
                    "image_id": index,
                    "category_id": 2,
                    "bbox": [int(value) for value in box],
                    "area": int(mask.sum()),
                    "segmentation": {"size": list(size), "counts": runs},
                }
            )
            info = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}]
            segments.append({"image_id": index, "file_name": name, "segments_info": info})
        ground, thing = {"id": 1, "name": "ground", "isthing": 0}, {"id": 2, "name": "disc", "isthing": 1}
        instances = {"images": images, "annotations": objects, "categories": [thing]}
        (root / f"instances_{split}.json").write_text(json.dumps(instances))
        panoptic = {"images": images, "annotations": segments, "categories": [ground, thing]}
        (root / f"panoptic_{split}.json").write_text(json.dumps(panoptic))
    (root / "classes.txt").write_text("ground\ndisc\n")
    return root


def config_of(case, root):
    if case == "classify":
        data = {"name": "folder", "root": str(root / "sorted"), "size": 32, "augment": {"scale": (0.5, 1.0)}}
        return {"task": "classify", "model": {"name": "nat_atto"}, "data": data} | COMMON
    model = BODY | (DETECT | SEGMENT)[case]
    kind = "panoptic" if case == "segment_panoptic" else "instances"
    data = {"root": str(root), "name": "coco", "augment": {}}
    for split in ("train", "val"):
        data[split] = {"annotations": f"{kind}_{split}.json", "images": f"images/{split}"}
        if kind == "panoptic":
            data[split]["maps"] = f"panoptic/{split}"
    if case in DETECT:
        return {"task": "detect", "model": model, "data": data} | COMMON
    names = {"segment_semantic": "folder", "segment_panoptic": "coco_panoptic"}
    data |= {"name": names.get(case, "coco"), "augment": {"crop": 64}, "short": None}
    return {"task": "segment", "model": model, "data": data} | COMMON


@pytest.mark.parametrize("case", [*DETECT, *SEGMENT, "classify"])
def test_figures_are_the_same_at_any_batch_size(case, root, tmp_path):
    """Bit for bit, where each image is a batch of its own; classifiers share batches and move by rounding alone."""
    path = tmp_path / "config.py"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config_of(case, root).items()))
    result = engine.train(engine.load_config(path), tmp_path / "run", progress=False)
    last = {key[4:]: value for key, value in result["history"][-1].items() if key.startswith("val/")}
    assert len(last) > 1
    printed = {}
    for size in (1, 3, 8):
        config = engine.load_config(path, [f"batch_size={size}"])
        metrics, _, _ = engine.evaluate(config, result["last"], progress=False)
        if case == "classify":
            assert metrics == pytest.approx(last, abs=1e-6)
        else:
            assert metrics == last
        output = tmp_path / f"predicted_{size}"
        argv = ["predict", str(root / "images" / "val"), "--checkpoint", str(result["last"]), "--threshold", "0"]
        assert main([*argv, "--batch-size", str(size), "--output", str(output), "--device", "cpu"]) == 0
        printed[size] = (output / "predictions.json").read_text().replace(str(output), "")
        assert json.loads(printed[size])
    if case == "classify":
        for one, *others in zip(*(json.loads(text) for text in printed.values()), strict=True):
            for other in others:
                assert [row["class"] for row in other["classes"]] == [row["class"] for row in one["classes"]]
                shares = [[row["probability"] for row in entry["classes"]] for entry in (one, other)]
                assert shares[0] == pytest.approx(shares[1], abs=2e-6)
    else:
        assert printed[1] == printed[3] == printed[8]
