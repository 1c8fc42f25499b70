"""Objects that a model found in an image: in plain types, counted, and only the likely ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .data.coco import encode_mask


def to_plain(detections: dict[str, Tensor]) -> dict[str, Any]:
    """Return a detector's answer for an image on the CPU, its masks as run lengths."""
    plain = {key: detections[key].detach().float().cpu() for key in ("boxes", "scores")}
    plain["labels"] = detections["labels"].cpu()
    if "masks" in detections:
        plain["masks"] = [encode_mask(mask) for mask in detections["masks"].cpu().numpy()]
    return plain


def keep_likely(detections: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """Return the objects whose score is at least ``threshold``."""
    keep = detections["scores"] >= threshold
    likely = {key: detections[key][keep] for key in ("boxes", "labels", "scores")}
    if "masks" in detections:
        likely["masks"] = [detections["masks"][index] for index in keep.nonzero()[:, 0].tolist()]
    return likely


def describe_objects(detections: Mapping[str, Any], classes: Sequence[str], threshold: float) -> dict[str, Any]:
    """Return, in plain types, the objects whose score is at least ``threshold``: masks as COCO's run lengths."""
    likely = keep_likely(detections, threshold)
    objects = []
    for index, (box, label, score) in enumerate(
        zip(likely["boxes"].tolist(), likely["labels"].tolist(), likely["scores"].tolist(), strict=True)
    ):
        entry = {"class": classes[label], "score": round(score, 6), "box": [round(value, 2) for value in box]}
        if "masks" in likely:
            mask = likely["masks"][index]
            entry["mask"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
        objects.append(entry)
    return {"objects": objects}


def count_objects(detections: Mapping[str, Any], classes: Sequence[str], threshold: float) -> str:
    """Return how many objects of which classes have at least the score ``threshold``, in a few words."""
    labels = keep_likely(detections, threshold)["labels"].tolist()
    counts = {classes[label]: labels.count(label) for label in sorted(set(labels), key=labels.index)}
    listed = ", ".join(f"{count} {name}" for name, count in list(counts.items())[:5])
    return listed + (", ..." if len(counts) > 5 else "") or f"nothing with a score of {threshold:g} or more"
