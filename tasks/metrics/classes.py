"""How well the objects of each class are found."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def measure_objects(
    predictions: Sequence[dict], targets: Sequence[dict], classes: Sequence[str], kinds: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row for each class: its AP of each kind, NaN where there is nothing to find, and its objects.

    Args:
        predictions: As for `measure_ap`.
        targets: The same.
        classes: Names, in the order of the labels.
        kinds: Of ``"box"`` and ``"mask"``.
    """
    from .average_precision import measure_ap

    rows: list[dict[str, Any]] = [{"class": name} for name in classes]
    for kind in kinds:
        measured = measure_ap(predictions, targets, kind)
        known = dict(zip(measured["classes"], measured["class_ap"], strict=True))
        for label, row in enumerate(rows):
            value = known.get(label, -1.0)
            row[f"{kind} ap"] = value if value >= 0 else float("nan")
    labels = [np.asarray(target["labels"])[np.asarray(target["iscrowd"]) == 0] for target in targets]
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]).astype(np.int64), minlength=len(classes))
    return [{**row, "objects": int(count)} for row, count in zip(rows, counts, strict=True)]
