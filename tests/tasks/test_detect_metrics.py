import json

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle_codec
from foveate.tasks.data.coco import encode_mask, mask_box, to_run_lengths
from foveate.tasks.metrics.average_precision import NUMBERS, measure_ap


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
    stats = [measured[number] for number in NUMBERS]
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


def disc(center, radius, size):
    y, x = np.mgrid[: size[0], : size[1]]
    return ((y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2).astype(np.uint8)


def random_scene(seed):
    """Images of several sizes with discs to find: crowds, ties, none to find, none found, more than 100 found."""
    draw = np.random.default_rng(seed)
    predictions, targets = [], []
    for image in range(draw.integers(1, 6)):
        size = tuple(draw.integers(40, 260, 2).tolist())
        truth, found = [], []
        for _ in range(draw.choice([0, 1, 3, 8])):
            circle = (draw.uniform(0, size[0]), draw.uniform(0, size[1])), draw.uniform(1, draw.choice([12, 90]))
            label, crowd = draw.integers(0, 3), draw.random() < 0.15
            truth.append((disc(*circle, size), label, crowd))
            for _ in range(draw.integers(0, 3)):
                center, radius = np.array(circle[0]) + draw.normal(0, 2, 2), circle[1] * draw.uniform(0.8, 1.2)
                found.append((disc(center, radius, size), label if draw.random() < 0.9 else draw.integers(0, 4)))
        strangers = 120 if seed % 25 == 0 and image == 0 else draw.choice([0, 0, 2])
        for _ in range(0 if seed % 10 == 3 else strangers):
            center = draw.uniform(0, size[0]), draw.uniform(0, size[1])
            found.append((disc(center, draw.uniform(1, 60), size), draw.integers(0, 4)))
        found = [] if seed % 10 == 3 else found
        truth, found = ([item for item in items if item[0].any()] for items in (truth, found))
        targets.append(
            entry(truth, size) | {"iscrowd": torch.tensor([int(crowd) for *_, crowd in truth]), "size": size}
        )
        targets[-1]["area"] = torch.tensor([float(mask.sum()) for mask, *_ in truth], dtype=torch.float64)
        scores = torch.tensor(np.round(draw.random(len(found)), draw.choice([1, 6])), dtype=torch.float64)
        predictions.append(entry(found, size) | {"scores": scores})
    return predictions, targets


def entry(items, size):
    boxes = [mask_box(mask) for mask, *_ in items]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        "labels": torch.tensor([int(item[1]) for item in items], dtype=torch.int64),
        "masks": [encode_mask(mask) for mask, *_ in items],
    }


def pycocotools_numbers(predictions, targets, kind):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def annotations(entries):
        rows = []
        for image, item in enumerate(entries):
            for index, (x1, y1, x2, y2) in enumerate(item["boxes"].tolist()):
                row = {"id": len(rows) + 1, "image_id": image, "category_id": int(item["labels"][index])}
                row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": item["masks"][index]}
                row |= {"score": float(item["scores"][index])} if "scores" in item else {}
                row |= {"iscrowd": int(item["iscrowd"][index]) if "iscrowd" in item else 0}
                box_area = (x2 - x1) * (y2 - y1)
                mask_area = float(rle_codec.area(item["masks"][index]))
                row |= {
                    "area": float(item["area"][index]) if "area" in item else {"box": box_area, "mask": mask_area}[kind]
                }
                rows.append(row)
        return rows

    coco, found = COCO(), COCO()
    for api, entries in ((coco, targets), (found, predictions)):
        api.dataset = {
            "images": [{"id": i, "height": t["size"][0], "width": t["size"][1]} for i, t in enumerate(targets)],
            "categories": [{"id": i} for i in range(4)],
            "annotations": annotations(entries),
        }
        api.createIndex()
    evaluation = COCOeval(coco, found, {"box": "bbox", "mask": "segm"}[kind])
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_random_scenes_have_pycocotools_numbers(kind, capsys):
    without_detections = 0
    for seed in range(200):
        predictions, targets = random_scene(seed)
        measured = measure_ap(predictions, targets, kind)
        expected = pycocotools_numbers(predictions, targets, kind)
        actual = [measured[number] for number in NUMBERS]
        np.testing.assert_allclose(actual, expected, atol=1e-6, err_msg=f"scene {seed}")
        without_detections += not any(len(prediction["labels"]) for prediction in predictions)
    assert without_detections > 10


def test_detections_in_images_without_masks_count():
    """By hand: a right mask, and one of a higher score in an image in which there is nothing."""
    mask = disc((20, 20), 9, (50, 70))
    truth = entry([(mask, 0)], (50, 70)) | {"iscrowd": torch.tensor([0]), "area": torch.tensor([float(mask.sum())])}
    nothing = entry([], (50, 70)) | {"iscrowd": torch.zeros(0), "area": torch.zeros(0)}
    targets = [item | {"size": (50, 70)} for item in (truth, nothing)]
    predictions = [entry([(mask, 0)], (50, 70)) | {"scores": torch.tensor([score])} for score in (0.5, 0.9)]
    assert measure_ap(predictions, targets, "mask")["ap"] == pytest.approx(0.5)


def test_no_mask_at_all_is_zero():
    mask = disc((20, 20), 9, (50, 70))
    truth = entry([(mask, 0)], (50, 70)) | {"iscrowd": torch.tensor([0]), "area": torch.tensor([float(mask.sum())])}
    nothing = entry([], (50, 70)) | {"scores": torch.zeros(0)}
    assert measure_ap([nothing], [truth | {"size": (50, 70)}], "mask")["ap"] == 0
    assert measure_ap([], [], "mask")["ap"] == -1
