"""Checkpoints of `foveate train`: plain tensors and types, written whole or not at all, loaded completely or not."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..zoo import CheckpointError
from ..zoo._checkpoint import open_checkpoint


def write_whole(path: str | Path, write: Callable[[str], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path`` and move it there; on any error nothing is left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        # mkstemp's files are private; the result gets the permissions any new file would.
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint of tensors and plain types."""
    write_whole(path, lambda file: torch.save(checkpoint, file))


def read_checkpoint(path: str | Path, task: str | None = None) -> dict:
    """Read a checkpoint of `foveate train` without executing what it pickles.

    Args:
        path: Its file.
        task: The task it must be of, if given.

    Returns:
        A dict with at least ``card``, a dict that says what the model is, and ``state_dict``, its weights.

    Raises:
        CheckpointError: If the file can't be read, or is no such checkpoint.
    """
    checkpoint = open_checkpoint(path)
    card = checkpoint.get("card")
    if not isinstance(card, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{path}: not a checkpoint of `foveate train`: it doesn't say which model it holds")
    if task is not None and card.get("task") != task:
        raise CheckpointError(f"{path}: holds a model to {card.get('task')}, not to {task}")
    return checkpoint


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a checkpoint's weights into ``model``: all of them, and no others.

    Raises:
        CheckpointError: If entries are missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [key for key in wanted if key in state and wanted[key].shape != state[key].shape],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for kind, keys in faults.items()
            if keys
        )
        raise CheckpointError(f"{path}: the weights don't fit the model: {listed}")
    model.load_state_dict(state)
