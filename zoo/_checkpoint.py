"""Reading published checkpoints: safely from disk, out of their wrappers, and only if they fit the model."""

import argparse
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

# In order of trust: the averaged weights are the published ones where a file holds both.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")

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
]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model; the message is one line."""


def open_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file, ``.safetensors`` or anything `torch.save` wrote, without executing what it pickles.

    Raises:
        CheckpointError: If the file is missing, truncated, no checkpoint, or holds objects beyond tensors and plain
            types.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_DATA_TYPES):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to switch the safety off; it must not reach the user.
        objects = any(kind in str(error).lower() for kind in ("unsupported global", "unsupported class"))
        reason = "it pickles objects, which could run code when read" if objects else "unknown pickle format"
        raise CheckpointError(f"{path}: not read: {reason}; only tensors and plain types are accepted") from error
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
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
    if any(key.startswith("backbone.") for key in state):
        return {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return state


def fit(state: dict[str, Tensor], model: nn.Module, name: str, features: bool) -> dict[str, Tensor]:
    """Return ``state`` if it fits ``model``, whose parameter names it uses, or say why not.

    Two kinds of entries may differ, because timm adapts or drops them afterwards: the classifier, and the input
    channels of the first convolution. A dense model (``out_norms``) may start from a classifier's weights: its output
    norms keep their initial values.

    Args:
        state: State dict with the model's parameter names.
        model: The model that is being built.
        name: Its registered name, for messages.
        features: Whether the model will be cut to its features, so that final norm and classifier may be missing.

    Raises:
        CheckpointError: If entries are missing, unexpected, or of another shape.
    """
    cfg = model.pretrained_cfg
    classifiers, first_convs = (
        (entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in (cfg["classifier"], cfg["first_conv"])
    )
    classifier = {f"{layer}.{leaf}" for layer in classifiers for leaf in ("weight", "bias")}
    wanted = model.state_dict()
    dense = any(key.startswith("out_norms.") for key in wanted)
    optional = classifier if dense or features else set()
    if dense and not any(key.startswith("out_norms.") for key in state):
        _logger.info(f"{name}: the checkpoint is a classifier's; the output norms keep their initial values")
        state = state | {key: value for key, value in wanted.items() if key.startswith("out_norms.")}
        state = {key: value for key, value in state.items() if not key.startswith(("norm.", "head.norm."))}
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
        faults = [
            f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if keys
        ]
        raise CheckpointError(
            f"the checkpoint is not one of {name}: {matched} of {len(wanted)} entries match, {'; '.join(faults)}"
        )
    heads = [state[key] for key in state if key in classifier and key.endswith(".weight")]
    if heads:
        # The file knows its class count; with it, timm keeps a classifier that fits and replaces one that doesn't.
        cfg["num_classes"] = heads[0].shape[0]
    return state


def filter_for(
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]], name: str, features: bool
) -> Callable[[Mapping, nn.Module], dict[str, Tensor]]:
    """Return timm's ``pretrained_filter_fn`` for a family: unwrap, ``convert`` to our names, then `fit`."""

    def checkpoint_filter(checkpoint: Mapping, model: nn.Module) -> dict[str, Tensor]:
        return fit(convert(unwrap(checkpoint), model), model, name, features)

    return checkpoint_filter
