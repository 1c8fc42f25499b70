"""Which model a checkpoint is one of: every model is built without storage, and the file's names and shapes tried."""

import dataclasses
import functools
from collections import Counter

import timm
import torch
from torch import Tensor

from .backbone import dense_settings_of
from .checkpoint import Checkpoint, CheckpointError, LoadReport, backbone_of
from .loading import WithoutInit, silence


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


def variants_of(checkpoint: Checkpoint, names: list[str]) -> list[Variant]:
    """Return the models that a checkpoint fits, of those that it fits best: without resampling if there are any.

    Several remain where models differ in what is no part of the weights, such as NAT and DiNAT in their dilations.

    Args:
        checkpoint: Of a classifier, a detector or a segmenter.
        names: Models to try.
    """
    # Detectors of ours keep the backbone behind timm's wrapper for features.
    state = {key.removeprefix("features.model."): value for key, value in backbone_of(checkpoint.state).items()}
    state = {key: torch.empty_like(value, device="meta") for key, value in state.items()}
    shapes = Counter(tuple(value.shape) for value in state.values())
    fitting = []
    with silence(__package__):
        for name in names:
            # Heads, renamed parts and tables of another size leave most shapes as they are.
            own_shapes = _shapes(name)
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


@functools.cache
def _shapes(name: str) -> Counter:
    with WithoutInit():
        model = timm.create_model(name, device="meta")
    return Counter(tuple(value.shape) for value in model.state_dict().values())


def _fitted(name: str, state: dict[str, Tensor], dense: bool) -> Variant:
    # Classes may be any.
    options = {"num_classes": 1000}
    if dense:
        settings = dense_settings_of(name)
        if not settings:
            raise CheckpointError(f"{name} has no dense settings")
        options = {"features_only": True, **next(iter(settings.values()))}
    with WithoutInit():
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)}, device="meta", **options
        )
    if dense:
        return Variant(name, True, model.model.load_report, None)
    # The file's count, which loading has left there.
    classes = model.pretrained_cfg["num_classes"]
    if not classes:
        raise CheckpointError("without a classifier it is a backbone")
    return Variant(name, False, model.load_report, classes)
