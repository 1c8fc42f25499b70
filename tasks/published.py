"""What the papers published of detectors and segmenters: ``detect/published.csv`` and ``segment/published.csv``.

A row is a trained model: its ``name`` (that of its weights, where there is a file), ``head``, ``backbone``, the dense
setting as `create_detector` and `create_segmenter` take it (``recipe``), ``data``, ``schedule``, the authors'
``metrics``, the ``licence`` of the weights, their ``url`` as the authors give it, the ``source`` and the ``config``
that trains it here. Nothing of it was measured by us.
"""

import csv
from importlib.resources import files

from ..zoo.weights import table


def read_published(task: str) -> list[dict[str, str]]:
    """Return the rows of ``"detect"`` or ``"segment"``, each with the ``state`` of its weights, ``"none"`` without."""
    text = (files(__package__) / task / "published.csv").read_text(encoding="utf-8")
    weights = table()
    return [
        row | {"state": weights[row["name"]].state if row["name"] in weights else "none"}
        for row in csv.DictReader(text.splitlines())
    ]
