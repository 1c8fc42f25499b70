"""Where to run."""

import torch

from . import TaskError


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``"auto"`` is CUDA if there is one, else the CPU.

    Raises:
        TaskError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TaskError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TaskError(f"device {name!r}: torch {torch.__version__} finds no CUDA device; use device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TaskError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise TaskError(f"device {name!r}: torch {torch.__version__} finds no MPS device; use device=cpu")
    return device
