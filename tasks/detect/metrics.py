"""Average precision of boxes and masks: pycocotools' numbers, by torchmetrics and faster-coco-eval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from ..coco import decode_masks

# torchmetrics draws its thresholds in float32; COCO's are these.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101).tolist()
# COCO's twelve numbers, by torchmetrics' names and ours.
NUMBERS = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
    "mar_1": "ar1",
    "mar_10": "ar10",
    "mar_100": "ar100",
    "mar_small": "ar_small",
    "mar_medium": "ar_medium",
    "mar_large": "ar_large",
}


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
    metric = MeanAveragePrecision(
        iou_type="bbox" if kind == "box" else "segm",
        iou_thresholds=IOU_THRESHOLDS,
        rec_thresholds=RECALL_THRESHOLDS,
        extended_summary=True,
        backend="faster_coco_eval",
        sync_on_compute=False,  # of several processes only the first measures
    )
    metric.warn_on_many_detections = False
    for prediction, target in zip(predictions, targets, strict=True):
        found = {"scores": prediction["scores"].double(), "labels": prediction["labels"]}
        truth = {key: target[key] for key in ("labels", "iscrowd", "area")}
        for entry, source in ((found, prediction), (truth, target)):
            if kind == "box":
                # In float32 a box would move by what decides between two thresholds.
                entry["boxes"] = source["boxes"].double()
            else:
                entry["masks"] = torch.from_numpy(decode_masks(source["masks"], *target["size"])).bool()
        metric.update([found], [truth])
    result = metric.compute()
    precision: Tensor = result["precision"][..., 0, -1]
    of_class = [values[values > -1].mean().item() if (values > -1).any() else -1.0 for values in precision.unbind(-1)]
    return {
        **{ours: float(result[theirs]) for theirs, ours in NUMBERS.items()},
        "classes": result["classes"].reshape(-1).tolist(),
        "class_ap": of_class,
        "precision": precision.numpy(),
    }
