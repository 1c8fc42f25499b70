"""Loading strictly: a state dict fits its model, up to what the caller names, or the error tells what is wrong."""

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .reading import CheckpointError, backbone_of, state_of

_logger = logging.getLogger(__name__)

# Returns the state dict under a model's names; None in the place of an entry of which the model keeps its own.
Convert = Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor | None]]
# Returns an entry, given by its name, made for another size, resampled to that of the model, and the rule's name, such
# as "bicubic"; None if it can't be.
Resize = Callable[[str, Tensor, torch.Size, nn.Module], tuple[Tensor, str] | None]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's entries; a built model has it as ``load_report``.

    Attributes:
        matched: How many of the model's entries the file gave.
        missing: Entries of the model that keep their initial values, as the options asked for.
        unexpected: Entries of the file that the model, with these options, has no use for.
        reshaped: Entries that were resampled or adapted: name, shape before, shape after, and the rule.
    """

    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...], str], ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.matched} entries matched"]
        if self.missing:
            parts.append(f"{len(self.missing)} keep their initial values ({_some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} of the file are not used ({_some(self.unexpected)})")
        if self.reshaped:
            changes = [f"{key} {_shape(old)} to {_shape(new)}, {rule}" for key, old, new, rule in self.reshaped]
            parts.append(f"{len(changes)} reshaped ({_some(changes, '; ')})")
        return ", ".join(parts)


def _some(items: Sequence[str], separator: str = ", ") -> str:
    return separator.join((*items[:3], *(("...",) if len(items) > 3 else ())))


def _differ_in_inputs(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two kernels are alike but for their input channels, of which either has some."""
    return len(shape) == len(other) and shape[1] > 0 and (*shape[:1], *shape[2:]) == (*other[:1], *other[2:])


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def faults_of(**kinds: Sequence[str]) -> str:
    """Return how many entries of a checkpoint are ``missing``, ``unexpected`` or of another shape, and the first."""
    return "; ".join(
        f"{len(keys)} {kind.replace('_', ' ')} ({_some(sorted(keys))})" for kind, keys in kinds.items() if keys
    )


class Fitted(NamedTuple):
    """A state dict that fits a model.

    Attributes:
        state: The entries that a file gives, resampled where they had to be.
        report: What became of every entry.
    """

    state: dict[str, Tensor]
    report: LoadReport


def fit(
    state: Mapping[str, Tensor],
    model: nn.Module,
    refusal: str,
    initial: Collection[str] = (),
    unused: Collection[str] = (),
    adapted: Collection[str] = (),
    resize: Resize | None = None,
    counts: bool = False,
    hint: str = "",
) -> Fitted:
    """Return ``state`` fitted to ``model``, whose names it uses: all entries of the one are in the other.

    Args:
        state: Entries of a file.
        model: What they are for; it isn't changed.
        refusal: What is said before the faults.
        initial: Entries of which the model keeps its own, whether or not the file has them.
        unused: Entries of the file that aren't the model's and may be left out.
        adapted: Kernels that may have other input channels, since somebody else adapts them.
        resize: Resamples entries that were made for another size.
        counts: Whether the error says how many entries match.
        hint: What is said after the faults.

    Raises:
        CheckpointError: If other entries are missing, unexpected or of another shape.
    """
    model_state, initial = model.state_dict(), dict.fromkeys(initial)
    fitted, reshaped, misshapen = {}, [], []
    for key, value in state.items():
        if key in initial or key not in model_state:
            continue
        size, rule = model_state[key].shape, "input channels adapted"
        resized = resize(key, value, size, model) if resize is not None and value.shape != size else None
        fitted[key], rule = (value, rule) if resized is None else resized
        if fitted[key].shape != size and not (key in adapted and _differ_in_inputs(fitted[key].shape, size)):
            misshapen.append(key)
        elif value.shape != size:
            reshaped.append((key, tuple(value.shape), tuple(size), rule))
    missing = [key for key in model_state if key not in fitted and key not in initial]
    unexpected = [key for key in state if key not in model_state and key not in unused]
    if missing or unexpected or misshapen:
        matching = f"{len(fitted) - len(misshapen)} of {len(model_state)} entries match, " if counts else ""
        faults = faults_of(missing=missing, unexpected=unexpected, of_another_shape=misshapen)
        raise CheckpointError(f"{refusal}: {matching}{faults}{hint}")
    left = sorted(key for key in state if key in initial or key not in model_state)
    return Fitted(fitted, LoadReport(len(fitted), tuple(initial), tuple(left), tuple(sorted(reshaped))))


def load(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    initial: Collection[str] = (),
    refusal: str = "the weights don't fit the model",
    hint: str = "",
) -> LoadReport:
    """Load a state dict into ``model``: all of the one, and all of the other.

    Args:
        model: Where to.
        state: Entries under its names.
        path: The file, for messages.
        initial: Entries of which the model keeps its own, whether or not the file has them.
        refusal: What is said before the faults.
        hint: What is said after the faults.

    Raises:
        CheckpointError: If other entries are missing, unexpected or of another shape.
    """
    fitted, report = fit(state, model, f"{path}: {refusal}", initial, hint=hint)
    own = model.state_dict()
    model.load_state_dict(fitted | {key: own[key] for key in initial})
    return report


def absent_counters(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Return the counters of batches that a state dict lacks: some files do, and they play no part in most norms."""
    return [key for key in model.state_dict() if key.endswith("num_batches_tracked") and key not in state]


def filter_for(
    convert: Convert,
    name: str,
    features: bool,
    classes_chosen: bool,
    resize: Resize | None = None,
) -> Callable[[Mapping, nn.Module], dict[str, Tensor]]:
    """Return timm's ``pretrained_filter_fn`` for a family: unwrap, ``convert`` to our names, then fit.

    Two kinds of entries may differ, because timm adapts or drops them afterwards: the classifier, if classes were asked
    for and the file has others or none, and the input channels of the first convolution. A dense model (``out_norms``)
    may start from a classifier's weights: its output norms keep their initial values. The model gets the `LoadReport`.

    Args:
        convert: Renames a published state dict to the model's names. It must leave the model's own names alone.
        name: The model's registered name, for messages.
        features: Whether the model will be cut to its features, so that final norm and classifier may be missing.
        classes_chosen: Whether the caller named the number of classes; only then may it differ from the file's.
        resize: Resamples what was made for another size of images.

    The filter raises a CheckpointError if entries are missing, unexpected, or of another shape, or the file has no
    classifier or one of another number of classes than the model, and nobody asked for that.
    """

    def checkpoint_filter(content: Mapping, model: nn.Module) -> dict[str, Tensor]:
        state = convert(backbone_of(state_of(content)), model)
        return _fit_family(state, model, name, features, classes_chosen, resize)

    return checkpoint_filter


def _fit_family(
    state: Mapping[str, Tensor | None],
    model: nn.Module,
    name: str,
    features: bool,
    classes_chosen: bool,
    resize: Resize | None,
) -> dict[str, Tensor]:
    """Return a state dict for timm to load; ``model`` gets the report, and its cfg the classes of the file."""
    cfg = model.pretrained_cfg
    classifiers, first_convs = (
        (entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in (cfg["classifier"], cfg["first_conv"])
    )
    model_state = model.state_dict()
    classifier = {
        f"{layer}.{leaf}"
        for layer in classifiers
        if _is_layer(layer, state, model_state)
        for leaf in ("weight", "bias")
    }
    initial = [key for key, value in state.items() if value is None]
    state = {key: value for key, value in state.items() if value is not None}
    initial += absent_counters(state, model)
    unused = {key for key in state if key in classifier and key not in model_state}
    dense = any(key.startswith("out_norms.") for key in model_state)
    optional = set(classifier)
    if dense and not any(key.startswith("out_norms.") for key in (*state, *initial)):
        _logger.info(f"{name}: the checkpoint is a classifier's; the output norms keep their initial values")
        initial = [*(key for key in model_state if key.startswith("out_norms.")), *initial]
        unused |= {key for key in state if key.startswith(("norm.", "head.norm."))}
    own = {key: model_state[key] for key in initial}
    if features and not dense:
        optional |= {key for key in model_state if key.startswith(("norm.", "head.norm."))}
    replaced = {
        key for key in classifier & state.keys() & model_state.keys() if state[key].shape != model_state[key].shape
    }
    initial += [key for key in model_state if key in replaced or (key in optional and key not in state)]
    first_conv = {f"{layer}.weight" for layer in first_convs}
    refusal = f"the checkpoint is not one of {name}"
    fitted, report = fit(state, model, refusal, initial, unused, first_conv, resize, counts=True)
    file_classes = next((len(state[key]) for key in state if key in classifier and key.endswith(".weight")), None)
    if not (dense or features):
        check_classes(name, file_classes, model.num_classes, classes_chosen)
    if file_classes or not features:
        # The file knows its class count; with it, timm keeps a classifier that fits, and else starts a new one.
        cfg["num_classes"] = file_classes or 0
    model.load_report = report
    _logger.log(logging.WARNING if report.reshaped else logging.INFO, f"{name}: {report}")
    return fitted | own | {key: state[key] for key in classifier & state.keys()}


def _is_layer(name: str, state: Mapping[str, Tensor | None], model_state: Mapping[str, Tensor]) -> bool:
    """Return whether a file's classifier is whole or not there, and fits the model unless it has other classes."""
    leaves = [f"{name}.{leaf}" for leaf in ("weight", "bias") if f"{name}.{leaf}" in model_state]
    shapes = [None if state.get(leaf) is None else state[leaf].shape for leaf in leaves]
    own = [model_state[leaf].shape for leaf in leaves]
    classes = {shape and shape[:1] for shape in shapes}
    return len(classes) <= 1 and (shapes == own or classes != {shape[:1] for shape in own})


def check_classes(name: str, file_classes: int | None, classes: int | None, explicit: bool) -> None:
    """Raise a CheckpointError if a classifier would start anew although nobody asked for that.

    Args:
        name: Of the model.
        file_classes: Classes of the checkpoint; None if it has no classifier.
        classes: Classes of the model.
        explicit: Whether the caller named them.
    """
    if explicit or not classes or file_classes == classes:
        return
    if file_classes is None:
        raise CheckpointError(
            f"the checkpoint has no classifier: give num_classes={classes} to start a new one of {name}"
        )
    raise CheckpointError(
        f"the checkpoint has {file_classes} classes, {name} has {classes}: give num_classes={file_classes} to keep its "
        f"classifier, or num_classes={classes} to start a new one"
    )
