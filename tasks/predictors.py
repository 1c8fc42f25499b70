"""The predictor that a checkpoint of any task asks for."""

import importlib
from pathlib import Path
from typing import Any

import torch

from ..zoo import CheckpointError
from . import TASKS
from .checkpoints import read_checkpoint


def load_predictor(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Return the predictor of a checkpoint of `foveate train`.

    It maps a list of images to their results, and for a result has ``describe`` (plain types), ``headline`` (a few
    words) and ``draw``.

    Raises:
        CheckpointError: If the file can't be read or is no such checkpoint.
    """
    task = read_checkpoint(path)["card"].get("task")
    if task not in TASKS:
        raise CheckpointError(f"{path}: holds a model to {task}; this version predicts to {', '.join(TASKS)}")
    return importlib.import_module(f".{task}", __package__).Predictor.from_checkpoint(path, device)
