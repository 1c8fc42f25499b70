"""Foveate: a zoo of vision attention models, registered as timm models.

Importing the package registers every backbone, so that ``timm.create_model("nat_tiny")`` works. The import stays
light: torch and timm, nothing else; no network. What needs more is imported when it is first named.
"""

from importlib import import_module
from importlib.metadata import version

from .zoo import create_backbone, list_models

__all__ = ["__version__", "create_backbone", "create_detector", "create_segmenter", "list_models"]
__version__ = version("foveate")

_LAZY = {"create_detector": ".tasks.detect", "create_segmenter": ".tasks.segment"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
