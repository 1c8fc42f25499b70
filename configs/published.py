"""What was published of detectors and segmenters, with the recipe that trains each here.

A model's numbers, license and links stand in ``zoo/weights.json`` where weights of it were published. ``published.csv``
holds what that table does not: models without weights, some of them without numbers too, such as those of our own that
nobody has trained, and of Mask2Former and OneFormer the dense setting and the length of the training. Nothing of it was
measured by us.
"""

import csv
import functools
from collections.abc import Mapping
from importlib.resources import files

from ..zoo.published import is_foreign
from ..zoo.weights import Weights, table
from .training import settings_of

# The dense setting of a task's backbones, unless the table says another.
SETTINGS = {"detect": "detection", "segment": "segmentation"}
# Dense settings that are not their task's usual one, and what they add to the names of recipes.
_SUFFIXES = {"detection_ws4": "_ws4"}
# Heads whose dense setting tells data and kind of truth; the names of their recipes do too.
_MASK_HEADS = ("mask2former", "oneformer")
_EPOCHS = {"737.5k": "100ep"}


def read_published(task: str) -> list[dict[str, str]]:
    """Return the published models of ``"detect"`` or ``"segment"``, each as a row of a table.

    A row has the model's ``name`` (that of its weights, where there is a file), ``head``, ``backbone``, ``setting``
    (the dense one, as `create_detector` and `create_segmenter` take it), ``data``, ``schedule``, the authors'
    ``metrics``, the ``license`` of the weights, the ``source``, the ``state`` of the weights (``"none"`` without) and
    the ``config`` that trains it here (empty if there is none).
    """
    return [dict(row) for row in _rows() if row["task"] == task and row["metrics"]]


@functools.cache
def _rows() -> tuple[Mapping[str, str], ...]:
    text = files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    table_rows = {
        row["name"]: {key: cell for key, cell in row.items() if cell} for row in csv.DictReader(text.splitlines())
    }
    rows = {name: _of_weights(entry) for name, entry in table().items() if entry.task in SETTINGS}
    rows |= {name: rows.get(name, {"state": "none", "metrics": ""}) | row for name, row in table_rows.items()}
    for name, row in rows.items():
        row["backbone"] = name.partition(".")[0]
        is_own = not is_foreign(row["backbone"])
        if is_own:
            row.setdefault("setting", SETTINGS[row["task"]])
        elif row["head"] in _MASK_HEADS:
            row.setdefault("setting", f"{row['data']}_{row['schedule'].split()[0]}")
        else:
            row.setdefault("setting", "")  # timm's own models have none
        data = row["setting"] if row["head"] in _MASK_HEADS else row["data"]
        schedule = _EPOCHS.get(row["schedule"], row["schedule"])
        head = row["head"]
        if head == "dino":
            # Which form of it the schedule says first.
            *form, schedule = schedule.split()
            head = "_".join([head, *form])
        recipe = f"{row['task']}/{head}_{row['backbone']}_{schedule}_{data}{_SUFFIXES.get(row['setting'], '')}"
        # timm's own were trained by the recipes of their zoos, of which only that of DINO is here; what is shipped, by
        # recipes that are files.
        has_recipe = row["state"] != "shipped" and (is_own or row["head"] == "dino")
        row["config"] = recipe if has_recipe and "_base_" in settings_of(recipe) else ""
    return tuple(rows.values())


def _of_weights(entry: Weights) -> dict[str, str]:
    """Return what the table of weights says of a detector or segmenter."""
    # The table has COCO's own names.
    numbers = entry.checked.measured if entry.state == "shipped" else entry.stated
    titles = {"AP": "mask AP", "mIoU multi-scale": "mIoU (multi-scale)"}
    return {
        "name": entry.name,
        "task": entry.task,
        "head": entry.head,
        "data": entry.data,
        "schedule": entry.schedule or "",
        "metrics": "; ".join(f"{titles.get(metric, metric)} {value}" for metric, value in numbers.items()),
        "license": entry.license or "not stated",
        "source": entry.page,
        "state": entry.state,
    }


def published_recipes() -> dict[str, Mapping[str, str]]:
    """Return the dense recipes that `training` makes, each with its row; ``metrics`` are empty if none are known."""
    return {row["config"]: row for row in _rows() if row["config"]}
