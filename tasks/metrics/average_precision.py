"""Average precision of boxes and masks: pycocotools' numbers, by faster-coco-eval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle_codec

from ..data.coco import to_run_lengths

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
# COCO's twelve numbers, in its order.
NUMBERS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)


def measure_ap(
    predictions: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]], kind: str = "box"
) -> dict[str, Any]:
    """Measure detections as COCO does, with at most 100 an image.

    Args:
        predictions: For every image ``boxes`` ``[N, 4]``, ``scores`` and ``labels`` ``[N]``, and for masks ``masks``,
            ``N`` run lengths.
        targets: For every image the same without scores, with ``iscrowd`` and ``area`` ``[N]`` and ``size``, the height
            and width.
        kind: ``"box"`` or ``"mask"``: what is compared, and the area of detections.

    Returns:
        The values of `NUMBERS`, as fractions, -1 where there is nothing to find; ``classes``, the labels that occur;
        and for each of them ``class_ap``, and ``precision`` ``[10, 101, classes]`` by IoU and recall, -1 for none.
    """
    with_masks = kind == "mask"
    labels = sorted({int(label) for entry in (*predictions, *targets) for label in entry["labels"]})
    images = [{"id": i, "height": target["size"][0], "width": target["size"][1]} for i, target in enumerate(targets)]
    truth, predicted = (
        COCO(
            {
                "images": images,
                "categories": [{"id": label} for label in labels],
                "annotations": _annotations(entries, images, with_masks),
            }
        )
        for entries in (targets, predictions)
    )
    evaluation = COCOeval_faster(truth, predicted, "segm" if with_masks else "bbox", print_function=lambda text: None)
    evaluation.params.iouThrs, evaluation.params.recThrs = IOU_THRESHOLDS, RECALL_THRESHOLDS
    if not labels:
        return dict.fromkeys(NUMBERS, -1.0) | {"classes": [], "class_ap": [], "precision": np.zeros((10, 101, 0))}
    evaluation.run()
    precision = evaluation.eval["precision"][..., 0, -1]
    of_class = [float(values[values > -1].mean()) if (values > -1).any() else -1.0 for values in precision.T]
    return {
        **dict(zip(NUMBERS, map(float, evaluation.stats), strict=False)),
        "classes": labels,
        "class_ap": of_class,
        "precision": precision,
    }


def _annotations(entries: Sequence[dict[str, Any]], images: Sequence[dict], with_masks: bool) -> list[dict[str, Any]]:
    """Return all images' truths, or detections, which have scores, in COCO's form."""
    annotations = []
    for image, entry in zip(images, entries, strict=True):
        labels = entry["labels"].tolist()
        if with_masks:
            shapes = [to_run_lengths(mask, image["height"], image["width"]) for mask in entry["masks"]]
            areas = [float(rle_codec.area(shape)) for shape in shapes]
        else:
            # In float32 a box would move by what decides between two thresholds.
            corners = entry["boxes"].double().reshape(-1, 4)
            shapes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
            areas = [width * height for *_, width, height in shapes]
        for index, (label, shape, area) in enumerate(zip(labels, shapes, areas, strict=True)):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": label,
                "segmentation" if with_masks else "bbox": shape,
            }
            if "scores" in entry:
                annotation |= {"score": float(entry["scores"][index]), "area": area, "iscrowd": 0}
            else:
                annotation |= {"area": float(entry["area"][index]), "iscrowd": int(entry["iscrowd"][index])}
            annotations.append(annotation)
    return annotations
