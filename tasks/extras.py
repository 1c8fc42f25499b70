"""Packages that come with an extra of foveate, imported where they are needed."""

from importlib import import_module
from types import ModuleType

from . import TaskError

_EXTRAS = {
    **dict.fromkeys(("albumentations", "cv2", "faster_coco_eval", "matplotlib", "mmengine", "scipy"), "all"),
    **dict.fromkeys(("torchmetrics", "yaml"), "all"),
    **dict.fromkeys(("pandas", "supervision"), "results"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "datasets": "datasets",
    "peft": "lora",
    "torchao": "pt2e",
}


def missing(name: str | None) -> str | None:
    """Return what to say of a package that can't be found; None if no extra brings it."""
    package = (name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return f"{package} is needed for this and isn't installed: pip install 'foveate[{_EXTRAS[package]}]'"


def require(name: str) -> ModuleType:
    """Import a module of an extra.

    Raises:
        TaskError: If its package isn't installed; the message names the extra.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (reason := missing(error.name)) is None:
            raise
        raise TaskError(reason) from error
