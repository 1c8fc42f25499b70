"""Which model a checkpoint is one of: models are built without storage, and the file's names and shapes tried.

``shapes.csv`` says of every model how many entries have shapes of which group, so that only those are built that the
file may be of. `.ci/models.py` writes it; a model that it lacks is built.
"""

import csv
import dataclasses
import functools
import zlib
from collections import Counter
from pathlib import Path

import timm
import torch
from timm.models import is_model, model_entrypoint
from torch import Tensor

from .backbone import dense_settings_of
from .checkpoint import Checkpoint, CheckpointError, LoadReport, backbone_of
from .library_errors import first_line
from .loading import WithoutInit, classes_of, input_of, silence

_TABLE = Path(__file__).with_name("shapes.csv")
# Shapes are told apart by their checksums' remainders.
_GROUPS = 64


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model that a checkpoint fits.

    Attributes:
        model: Registered name.
        dense: Whether it fits as a backbone with the published dense settings, not as a classifier.
        report: What would be loaded.
        classes: Classes of the file's classifier; None of a dense backbone.
    """

    model: str
    dense: bool
    report: LoadReport
    classes: int | None


def count_classes(name: str, checkpoint: Checkpoint) -> int | None:
    """Return how many classes a file of a model, ours or timm's, has a classifier for; None without one."""
    own = name.partition(".")[0]
    fitting = variants_of(checkpoint, [own]) if own in _table() else []
    return fitting[0].classes if fitting else classes_of(name, checkpoint)


def variants_of(checkpoint: Checkpoint, names: list[str]) -> list[Variant]:
    """Return the models that a checkpoint fits, of those that it fits best: without resampling if there are any.

    Several remain where models differ in what is no part of the weights, such as NAT and DiNAT in their dilations.

    Args:
        checkpoint: Of a classifier, a detector or a segmenter.
        names: Models to try.
    """
    # Detectors of ours keep the backbone behind timm's wrapper for features.
    state = {key.removeprefix("features.model."): value for key, value in backbone_of(checkpoint.state).items()}
    state = _without_storage(state)
    shapes = Counter(tuple(value.shape) for value in state.values())
    fitting = []
    groups = groups_of(shapes)
    with silence(__package__):
        for name in names:
            # Of what is of one group, no more than all is of one shape.
            own = _table().get(name)
            if own and 2 * sum(map(min, own, groups)) < max(sum(own), sum(groups)):
                continue
            # Heads, renamed parts and tables of another size leave most shapes as they are.
            own_shapes = shapes_of(name)
            if 2 * (own_shapes & shapes).total() < max(own_shapes.total(), shapes.total()):
                continue
            for dense in (False, True):
                try:
                    fitting.append(_fitted(name, state, dense))
                    break
                except (CheckpointError, LookupError, RuntimeError, TypeError, ValueError):
                    # Another family's names and shapes may break a conversion anywhere.
                    continue
    exact = [variant for variant in fitting if not variant.report.reshaped]
    return exact or fitting


def identity_fault(name: str, task: str, checkpoint: Checkpoint) -> str | None:
    """Return why a file can't be a published one of a model, by its names and shapes; None if it can be.

    A classifier's must fit. Of a detector's or segmenter's, whose heads are many, most of the backbone's shapes must be
    there. What models of equal shapes differ in, such as NAT and DiNAT in their dilations, no file tells.

    Args:
        name: The model's registered name; of others, nothing is known.
        task: ``"classify"``, ``"detect"``, ``"segment"`` or ``"other"``.
        checkpoint: The file.
    """
    if task == "other" or not is_model(name):
        return None
    try:
        state = _without_storage(backbone_of(checkpoint.state))
    except CheckpointError as error:
        return str(error)
    own = model_entrypoint(name).__module__.startswith(f"{__package__}.")
    if task == "classify" and own:
        try:
            with silence(__package__):
                _fitted(name, state, dense=False)
        except CheckpointError as error:
            return str(error)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"the checkpoint is not one of {name} ({first_line(error)})"
        return None
    shapes, own_shapes = Counter(tuple(value.shape) for value in state.values()), shapes_of(name)
    shared, most = (own_shapes & shapes).total(), max(own_shapes.total(), shapes.total())
    # timm's names of others' backbones are of several forms, whose shapes differ.
    if shared < (0.75 if own else 0.5) * most:
        return f"the checkpoint is not one of {name}: {shared} of {most} entries of its backbone have their shapes"
    return None


def _without_storage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.empty_like(value, device="meta") for key, value in state.items()}


@functools.cache
def shapes_of(name: str) -> Counter:
    """Return how many entries of a model have which shape."""
    with WithoutInit():
        model = timm.create_model(name, device="meta")
    return Counter(tuple(value.shape) for value in model.state_dict().values())


def groups_of(shapes: Counter) -> list[int]:
    """Return how many entries have shapes of each group, as ``shapes.csv`` has them."""
    counts = [0] * _GROUPS
    for shape, count in shapes.items():
        counts[zlib.crc32(repr(tuple(shape)).encode()) % _GROUPS] += count
    return counts


@functools.cache
def _table() -> dict[str, list[int]]:
    with _TABLE.open(newline="") as file:
        return {row["model"]: [int(count) for count in row["entries by group"].split()] for row in csv.DictReader(file)}


def _fitted(name: str, state: dict[str, Tensor], dense: bool) -> Variant:
    # Classes may be any.
    options = {"num_classes": 1000}
    if dense:
        settings = dense_settings_of(name)
        if not settings:
            raise CheckpointError(f"{name} has no dense settings")
        options = {"features_only": True, **next(iter(settings.values()))}
    options |= input_of(name, Checkpoint(Path(), state))
    overlay = options.pop("pretrained_cfg_overlay", {}) | {"state_dict": dict(state)}
    with WithoutInit():
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, device="meta", **options)
    if dense:
        return Variant(name, True, model.model.load_report, None)
    # The file's count, which loading has left there.
    classes = model.pretrained_cfg["num_classes"]
    if not classes:
        raise CheckpointError("without a classifier it is a backbone")
    return Variant(name, False, model.load_report, classes)
