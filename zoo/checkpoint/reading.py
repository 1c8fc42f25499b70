"""Reading checkpoint files: safely, once, and out of their wrappers."""

import argparse
import dataclasses
import functools
import json
import logging
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..library_errors import first_line, needs_unpickling
from .arrays import MAX_STEPS, PlainType, UnsafePickleError, is_pickle, plain_scalar, read_arrays

_logger = logging.getLogger(__name__)

# In order of trust: the averaged weights are the published ones where a file holds both. mmengine swaps them to save:
# its `state_dict` is the average, and its `ema_state_dict` what was trained.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "ema_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
# The largest models have a few thousand.
_MOST_ENTRIES = 100_000
# Torch's files before 1.6 are so many pickles, and then the numbers.
_LEGACY_PICKLES = 5
# Bytes of the record that ends a zip archive; the last two say how long the comment is that follows.
_END = 22


class _Unread:
    """Stands for an object of a training log, which is of no use and is never made."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state: object):
        pass


# What training files hold beside tensors: settings and measured numbers. These types are data, reading them runs no
# code of the file's choice. A settings node of yacs, a dict itself, is read as a plain dict; yacs is not imported.
_DATA_TYPES = [
    (OrderedDict, "yacs.config.CfgNode"),
    argparse.Namespace,
    (PlainType, "numpy.dtype"),
    (plain_scalar, "numpy._core.multiarray.scalar"),
    (plain_scalar, "numpy.core.multiarray.scalar"),
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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """A file that has been read; what is given a ``checkpoint`` takes it in the place of the file's path.

    Attributes:
        path: The file.
        content: What it holds.
        metadata: What a file of safetensors says about itself; empty for others.
    """

    path: Path
    content: Mapping[str, Any]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.path)

    @functools.cached_property
    def card(self) -> dict[str, Any] | None:
        """What a file that foveate wrote says of its model, in a checkpoint or in the metadata of safetensors."""
        card = self.content.get("card")
        if isinstance(card, Mapping) and card:
            return dict(card)
        try:
            card = json.loads(self.metadata.get("foveate", "null"))
        except (ValueError, RecursionError):
            return None
        return card if isinstance(card, dict) else None

    @functools.cached_property
    def state(self) -> dict[str, Tensor]:
        """The state dict inside, see `state_of`; of several, a warning of the log says which.

        Raises:
            CheckpointError: If there is none.
        """
        # A run of ours says what it is.
        if self.card is None and len(keys := _wrappers(self.content)) > 1:
            _logger.warning(
                "%s: its %s is read, not its %s; a file that holds nothing else is read for that: "
                "torch.save({KEY: torch.load(FILE)[KEY]}, OTHER)",
                self.path,
                keys[0],
                " or ".join(keys[1:]),
            )
        return state_of(self.content)


def _is_safetensors(path: Path) -> bool:
    """Return whether a file is one of safetensors, by its content: the length of its header, then the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def open_checkpoint(path: str | Path | Checkpoint) -> Checkpoint:
    """Read a checkpoint file, of safetensors, detectron2's arrays or anything `torch.save` wrote, without running it.

    What the file is, its content tells, not its name. One that is read already is not read again.

    Raises:
        CheckpointError: If the file is missing, truncated, no checkpoint, or holds objects beyond tensors and plain
            types.
    """
    if isinstance(path, Checkpoint):
        return path
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix in (".onnx", ".pt2"):
        raise CheckpointError(
            f"{path}: an exported model, no checkpoint; `foveate predict IMAGE --model {path}` takes it, here the file "
            "goes that it was made of"
        )
    # The length that begins a file of safetensors may have a pickle's first byte.
    safe = path.suffix == ".safetensors" or _is_safetensors(path)
    if not safe and is_pickle(path):
        return Checkpoint(path, _of_arrays(path))
    try:
        if safe:
            return _of_safetensors(path)
        _check_archive(path)
        with torch.serialization.safe_globals(_DATA_TYPES):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own text advises to switch the safety off; it must not reach the user.
        objects = needs_unpickling(error)
        reason = "it pickles objects, which could run code when read" if objects else "no checkpoint, or a damaged one"
        raise CheckpointError(f"{path}: not read: {reason}; only tensors and plain types are accepted") from error
    except Exception as error:
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return Checkpoint(path, checkpoint)


def _check_archive(path: Path) -> None:
    """Raise a CheckpointError if a file of torch is damaged, or would fill the memory: torch looks for neither."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError(f"{path}: not read: its entries are compressed, which torch's never are")
            for entry in entries:
                # A byte is an opcode at most.
                if entry.filename.endswith("data.pkl") and entry.file_size > MAX_STEPS:
                    with archive.open(entry) as file:
                        _count_steps(path, file, pickles=1)
            if more := _bytes_behind(path):
                raise CheckpointError(f"{path}: damaged: {more} bytes follow its archive; write or fetch it again")
            # torch can be told to write none.
            if any(entry.CRC for entry in entries) and (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"{path}: damaged: the checksum of {damaged} is another; write or fetch it again")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError):
        # No zip, or a truncated one, which torch says.
        if path.stat().st_size > MAX_STEPS and not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                _count_steps(path, file, _LEGACY_PICKLES)


def _bytes_behind(path: Path) -> int:
    """Return how many bytes follow the record that ends an archive, which readers look for and pass over."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _END - 2**16))
        tail = file.read()
    place = tail.rfind(b"PK\x05\x06")
    return len(tail) - place - _END - int.from_bytes(tail[place + _END - 2 : place + _END], "little")


def _count_steps(path: Path, file: BinaryIO, pickles: int) -> None:
    """Raise a CheckpointError if pickles at the start of a file have more opcodes than any checkpoint needs."""
    steps = 0
    try:
        for _ in range(pickles):
            for _ in pickletools.genops(file):
                steps += 1
                if steps > MAX_STEPS:
                    raise CheckpointError(f"{path}: not read: it pickles more than {MAX_STEPS:,} things")
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        # No pickle, which torch says.


def _of_safetensors(path: Path) -> Checkpoint:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return Checkpoint(path, {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {})


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


def _wrappers(content: Mapping[str, Any]) -> list[str]:
    """Return the keys under which a checkpoint may hold a state dict, the one that is read first."""
    return [key for key in _WRAPPERS if isinstance(content.get(key), Mapping) and content[key]]


def state_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict inside a checkpoint: out of its wrapper, without the prefixes of parallel training.

    Raises:
        CheckpointError: If there is none.
    """
    state, outer, kind = content, [], ""
    while keys := _wrappers(state):
        kind, inner = keys[0], state[keys[0]]
        if any(inner is known for known in (state, *outer)):
            raise CheckpointError("the checkpoint holds itself, endlessly")
        outer.append(state)
        state = inner
    if len(state) > _MOST_ENTRIES:
        raise CheckpointError(f"the checkpoint holds {len(state):,} entries, more than any model")
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"the checkpoint holds no state dict, only {', '.join(map(repr, list(state)[:6]))}")
    # Beside the weights of an average mmengine counts.
    counter = ("steps",) if kind == "ema_state_dict" else ()
    state = {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in counter}
    if strange := [key for key in state if not isinstance(key, str)]:
        raise CheckpointError(f"the checkpoint holds no state dict: {strange[0]!r} is no entry's name")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict, or of a dense model's the backbone's part."""
    state = dict(state)
    # The second is that of our own detectors and segmenters.
    for prefix in ("backbone.", "features.model."):
        if any(key.startswith(prefix) for key in state):
            # mmpretrain's classifiers have theirs beside the backbone.
            head = {key: state[key] for key in ("head.fc.weight", "head.fc.bias") if key in state}
            state = head | {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state
