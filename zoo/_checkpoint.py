"""Reading published checkpoints: safely from disk, out of their wrappers, and only if they fit the model."""

import argparse
import dataclasses
import json
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ._arrays import UnsafePickleError, is_pickle, read_arrays
from .library_errors import first_line, needs_unpickling

_logger = logging.getLogger(__name__)

# In order of trust: the averaged weights are the published ones where a file holds both.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")


class _Unread:
    """Stands for an object of a training log, which is of no use and is never made."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state: object):
        pass


# What training files hold beside tensors: settings and measured numbers. These types are data, reading them runs no
# code of the file's choice. A settings node of yacs, a dict itself, is read as a plain dict; yacs is not imported.
_NUMPY_SCALAR = np.float64().__reduce__()[0]
_DATA_TYPES = [
    (OrderedDict, "yacs.config.CfgNode"),
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    # The curves that mmengine keeps beside the weights.
    *(
        (_Unread, name)
        for name in (
            "mmengine.logging.history_buffer.HistoryBuffer",
            "numpy.ndarray",
            "numpy._core.multiarray._reconstruct",
            "numpy.core.multiarray._reconstruct",
            "builtins.getattr",
        )
    ),
]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model; the message is one line."""


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


def faults_of(**kinds: Sequence[str]) -> str:
    """Return how many entries of a checkpoint are ``missing``, ``unexpected`` or of another shape, and the first."""
    return "; ".join(
        f"{len(keys)} {kind.replace('_', ' ')} ({_some(sorted(keys))})" for kind, keys in kinds.items() if keys
    )


def misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Return, as `faults_of` does, in what a state dict differs from the wanted one in names and shapes."""
    return faults_of(
        missing=[key for key in wanted if key not in state],
        unexpected=[key for key in state if key not in wanted],
        of_another_shape=[key for key in wanted if key in state and wanted[key].shape != state[key].shape],
    )


def with_counters(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict with ``model``'s counters of batches for batch norms whose counters a file lacks."""
    own = model.state_dict().items()
    return {key: value for key, value in own if key.endswith("num_batches_tracked")} | state


def _some(items: Sequence[str], separator: str = ", ") -> str:
    return separator.join((*items[:3], *(("...",) if len(items) > 3 else ())))


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def resampled(table: Tensor, source: Tensor, rule: str) -> Tensor:
    """Return ``table`` noted, for the report, as made from ``source`` by a rule such as ``"bicubic"``."""
    table.resampled_from = (tuple(source.shape), rule)
    return table


def is_safetensors(path: Path) -> bool:
    """Return whether a file is one of safetensors, by its content: the length of its header, then the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def card_of(path: str | Path, checkpoint: Mapping) -> dict | None:
    """Return what a file that foveate wrote says of its model: in a checkpoint, or in the metadata of safetensors.

    Args:
        path: The file.
        checkpoint: What `open_checkpoint` read of it.
    """
    card = checkpoint.get("card")
    if isinstance(card, Mapping) and card:
        return dict(card)
    try:
        card = json.loads(metadata_of(path).get("foveate", "null"))
    except ValueError:
        return None
    return card if isinstance(card, dict) else None


def metadata_of(path: str | Path) -> dict[str, str]:
    """Return what a file of safetensors says about itself; nothing for other files."""
    if not is_safetensors(Path(path)):
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def open_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file, of safetensors, detectron2's arrays or anything `torch.save` wrote, without running it.

    What the file is, its content tells, not its name.

    Raises:
        CheckpointError: If the file is missing, truncated, no checkpoint, or holds objects beyond tensors and plain
            types.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    # The length that begins a file of safetensors may have a pickle's first byte.
    safe = path.suffix == ".safetensors" or is_safetensors(path)
    if not safe and is_pickle(path):
        return _of_arrays(path)
    try:
        if safe:
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_DATA_TYPES):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to switch the safety off; it must not reach the user.
        objects = needs_unpickling(error)
        reason = "it pickles objects, which could run code when read" if objects else "unknown pickle format"
        raise CheckpointError(f"{path}: not read: {reason}; only tensors and plain types are accepted") from error
    except Exception as error:
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def _of_arrays(path: Path) -> dict:
    """Read a pickle of NumPy arrays, as detectron2's model zoo has them."""
    try:
        checkpoint = read_arrays(path)
    except UnsafePickleError as error:
        raise CheckpointError(
            f"{path}: not read: {error}; only tensors and plain types are accepted, and arrays of numbers"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    if not isinstance(checkpoint.get("model"), Mapping):
        raise CheckpointError(
            f"{path}: a pickle without a 'model', such as the blobs of Caffe2; its names are not known here"
        )
    return checkpoint


def state_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """Return the state dict inside a checkpoint: out of its wrapper, without the prefixes of parallel training."""
    state = checkpoint
    while inner := next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping) and state[key]), None):
        state = inner
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"the checkpoint holds no state dict, only {', '.join(map(repr, list(state)[:6]))}")
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def unwrap(checkpoint: Mapping) -> dict[str, Tensor]:
    """Return the state dict inside a checkpoint, or of a dense model's the backbone's part."""
    state = state_of(checkpoint)
    # The second is that of our own detectors and segmenters.
    for prefix in ("backbone.", "features.model."):
        if any(key.startswith(prefix) for key in state):
            # mmpretrain's classifiers have theirs beside the backbone.
            head = {key: state[key] for key in ("head.fc.weight", "head.fc.bias") if key in state}
            state = head | {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def fit(
    state: dict[str, Tensor], model: nn.Module, name: str, features: bool, classes_chosen: bool
) -> dict[str, Tensor]:
    """Return ``state`` if it fits ``model``, whose parameter names it uses, or say why not.

    Two kinds of entries may differ, because timm adapts or drops them afterwards: the classifier, if classes were asked
    for and the file has others or none, and the input channels of the first convolution. A dense model (``out_norms``)
    may start from a classifier's weights: its output norms keep their initial values. The model gets the `LoadReport`.

    Args:
        state: State dict with the model's parameter names.
        model: The model that is being built.
        name: Its registered name, for messages.
        features: Whether the model will be cut to its features, so that final norm and classifier may be missing.
        classes_chosen: Whether the caller named the number of classes; only then may it differ from the file's.

    Raises:
        CheckpointError: If entries are missing, unexpected, or of another shape, or the file has no classifier or one
            of another number of classes than the model, and nobody asked for that.
    """
    cfg = model.pretrained_cfg
    classifiers, first_convs = (
        (entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in (cfg["classifier"], cfg["first_conv"])
    )
    classifier = {f"{layer}.{leaf}" for layer in classifiers for leaf in ("weight", "bias")}
    wanted = model.state_dict()
    dense = any(key.startswith("out_norms.") for key in wanted)
    optional = classifier
    report_missing: list[str] = []
    unused: list[str] = []
    if dense and not any(key.startswith("out_norms.") for key in state):
        _logger.info(f"{name}: the checkpoint is a classifier's; the output norms keep their initial values")
        report_missing += [key for key in wanted if key.startswith("out_norms.")]
        unused += [key for key in state if key.startswith(("norm.", "head.norm."))]
        state = state | {key: wanted[key] for key in report_missing}
        state = {key: value for key, value in state.items() if key not in unused}
    if features and not dense:
        optional = optional | {key for key in wanted if key.startswith(("norm.", "head.norm."))}

    missing = [key for key in wanted if key not in state and key not in optional]
    unexpected = [key for key in state if key not in wanted and key not in classifier]
    first_conv = {f"{layer}.weight" for layer in first_convs}
    misshapen = [
        key for key in wanted.keys() & state.keys() - classifier - first_conv if wanted[key].shape != state[key].shape
    ]
    if missing or unexpected or misshapen:
        matched = len(wanted.keys() & state.keys()) - len(misshapen)
        raise CheckpointError(
            f"the checkpoint is not one of {name}: {matched} of {len(wanted)} entries match, "
            f"{faults_of(missing=missing, unexpected=unexpected, of_another_shape=misshapen)}"
        )
    held = next((len(state[key]) for key in state if key in classifier and key.endswith(".weight")), None)
    if not (dense or features):
        check_classes(name, held, model.num_classes, classes_chosen)
    if held or not features:
        # The file knows its class count; with it, timm keeps a classifier that fits, and else starts a new one.
        cfg["num_classes"] = held or 0
    model.load_report = _report(state, wanted, classifier, report_missing, unused)
    _logger.log(logging.WARNING if model.load_report.reshaped else logging.INFO, f"{name}: {model.load_report}")
    return state


def check_classes(name: str, held: int | None, classes: int | None, chosen: bool) -> None:
    """Raise a CheckpointError if a classifier would start anew although nobody asked for that.

    Args:
        name: Of the model.
        held: Classes of the checkpoint; None if it has no classifier.
        classes: Classes of the model.
        chosen: Whether the caller named them.
    """
    if chosen or not classes or held == classes:
        return
    if held is None:
        raise CheckpointError(
            f"the checkpoint has no classifier: give num_classes={classes} to start a new one of {name}"
        )
    raise CheckpointError(
        f"the checkpoint has {held} classes, {name} has {classes}: give num_classes={held} to keep its classifier, or "
        f"num_classes={classes} to start a new one"
    )


def _report(
    state: dict[str, Tensor], wanted: dict[str, Tensor], classifier: set[str], missing: list[str], unused: list[str]
) -> LoadReport:
    replaced = [key for key in classifier & state.keys() if key not in wanted or wanted[key].shape != state[key].shape]
    # What a family's conversion has filled in from the model itself is not the file's.
    filled = [key for key in wanted if key in state and 0 != state[key].data_ptr() == wanted[key].data_ptr()]
    missing = list(dict.fromkeys([*missing, *filled, *(key for key in wanted if key not in state or key in replaced)]))
    reshaped = []
    for key in wanted.keys() & state.keys() - set(replaced):
        shape, rule = getattr(state[key], "resampled_from", (tuple(state[key].shape), "input channels adapted"))
        if shape != tuple(wanted[key].shape):
            reshaped.append((key, shape, tuple(wanted[key].shape), rule))
    matched = len(wanted) - len(missing)
    return LoadReport(matched, tuple(missing), tuple(sorted({*unused, *replaced})), tuple(sorted(reshaped)))


def filter_for(
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    name: str,
    features: bool,
    classes_chosen: bool,
) -> Callable[[Mapping, nn.Module], dict[str, Tensor]]:
    """Return timm's ``pretrained_filter_fn`` for a family: unwrap, ``convert`` to our names, then `fit`."""

    def checkpoint_filter(checkpoint: Mapping, model: nn.Module) -> dict[str, Tensor]:
        return fit(convert(unwrap(checkpoint), model), model, name, features, classes_chosen)

    return checkpoint_filter
