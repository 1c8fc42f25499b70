"""Foveate: a zoo of vision attention models, registered as timm models.

After ``import foveate``, ``timm.create_model("nat_tiny")`` works, whichever of the two is imported first. The import
itself is light: torch and timm, and what needs more than these, are imported when they are first asked for.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = [
    "__version__",
    "create_backbone",
    "create_detector",
    "create_segmenter",
    "list_models",
    "load",
    "record_attention",
]

_HOMES = {
    "create_backbone": ".zoo",
    "create_detector": ".tasks.dense.detect",
    "create_segmenter": ".tasks.dense.segment",
    "list_models": ".zoo",
    "load": ".tasks.load",
    "record_attention": ".tasks.seeing.record",
}
_MODULES = {"explain": ".tasks.seeing", "natten": ".blocks.natten", "probes": ".tasks.probes"}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("foveate")
    if name in _MODULES:
        return import_module(_MODULES[name], __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


class _Registration:
    """Imports the models right after timm, which costs seconds that not every command needs: who has timm has them.

    It stands among the finders of Python's import system, and lets the others find. Rooms that the models are built of
    import timm themselves; then the models come after the outermost of them.
    """

    after = ("timm", f"{__name__}.kernels", f"{__name__}.blocks", f"{__name__}.zoo")
    running = 0

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in cls.after:
            return None
        others = (finder for finder in sys.meta_path if finder is not cls)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(cls._execute, spec.loader.exec_module)
        return spec

    @classmethod
    def _execute(cls, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        cls.running += 1
        try:
            execute(module)
        finally:
            cls.running -= 1
        if not cls.running and "timm" in sys.modules:
            import_module(".zoo", __name__)


if "timm" in sys.modules:
    import_module(".zoo", __name__)
else:
    sys.meta_path.insert(0, _Registration)
