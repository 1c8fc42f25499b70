import json

import numpy as np
import pytest
import torch
from foveate.tasks.coco import to_run_lengths
from foveate.tasks.detect.metrics import NUMBERS, measure_ap


@pytest.fixture(scope="module")
def coco(golden_folder):
    """Detections and truths of 12 images, 7 of the truths crowds, and pycocotools' numbers for them."""
    data = json.loads((golden_folder / "dense" / "coco_eval_data.json").read_text())
    labels = {category["id"]: label for label, category in enumerate(data["gt"]["categories"])}
    images = {image["id"]: (image["height"], image["width"]) for image in data["gt"]["images"]}

    def gather(entries, key, size):
        entries = [entry for entry in entries if entry["image_id"] == key]
        boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return entries, {
            "boxes": boxes,
            "labels": torch.tensor([labels[entry["category_id"]] for entry in entries], dtype=torch.int64),
            "masks": [to_run_lengths(entry["segmentation"], *size) for entry in entries],
        }

    predictions, targets = [], []
    for key, size in images.items():
        entries, target = gather(data["gt"]["annotations"], key, size)
        target["iscrowd"] = torch.tensor([entry["iscrowd"] for entry in entries])
        target["area"] = torch.tensor([entry["area"] for entry in entries], dtype=torch.float64)
        targets.append(target | {"size": size})
        entries, prediction = gather(data["detections"], key, size)
        prediction["scores"] = torch.tensor([entry["score"] for entry in entries], dtype=torch.float64)
        predictions.append(prediction)
    return predictions, targets, np.load(golden_folder / "dense" / "coco_eval.npz")


@pytest.mark.parametrize(("kind", "name"), [("box", "bbox"), ("mask", "segm")])
def test_average_precision_is_pycocotools(coco, kind, name):
    predictions, targets, expected = coco
    measured = measure_ap(predictions, targets, kind)
    stats = [measured[number] for number in NUMBERS.values()]
    np.testing.assert_allclose(stats, expected[f"{name}_stats.value"], atol=1e-6)
    np.testing.assert_allclose(measured["class_ap"], expected[f"{name}_per_class_ap.value"], atol=1e-6)


def target(boxes, **kwargs):
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    count = len(boxes)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    fixed = {"boxes": boxes, "labels": torch.zeros(count, dtype=torch.int64), "area": area, "size": (50, 70)}
    return fixed | {"iscrowd": torch.zeros(count, dtype=torch.int64)} | kwargs


def prediction(boxes, scores):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64), "scores": torch.tensor(scores)}


def test_no_detection_is_zero_and_nothing_to_find_is_marked():
    nothing = measure_ap([prediction([], [])], [target([[0, 0, 40, 40]])])
    assert nothing["ap"] == 0
    assert nothing["ap_large"] == -1
    assert measure_ap([prediction([[0, 0, 4, 4]], [0.5])], [target([])])["ap"] == -1


def test_a_detection_in_a_crowd_is_not_counted():
    truth = target([[0, 0, 10, 10], [20, 20, 60, 50]], iscrowd=torch.tensor([0, 1]))
    found = prediction([[0, 0, 10, 10], [22, 22, 30, 30]], [0.5, 0.9])
    assert measure_ap([found], [truth])["ap"] == pytest.approx(1)
