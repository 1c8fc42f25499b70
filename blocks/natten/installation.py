"""Putting a namespace in NATTEN's place among Python's modules, and taking it away again."""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from . import hub
from .names import release as namespace
from .names import table, why_not


class _Metadata(importlib.metadata.Distribution):
    """What `importlib.metadata` answers about the distribution "natten"."""

    def __init__(self, version: str):
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: natten\nVersion: {version}\nSummary: served by foveate\n",
            "top_level.txt": "natten\n",
        }

    def read_text(self, filename: str) -> str | None:
        """Return a file of the distribution, or None."""
        return self._files.get(filename)

    def locate_file(self, path: object) -> Path:
        """Return where a file would be; there is none."""
        return Path(__file__).parent / str(path)


class _Finder:
    """Stands first among Python's finders: explains absent names, answers about the version, and repairs transformers.

    The modules themselves are in `sys.modules`, so Python asks for those only that are missing.
    """

    def __init__(self, root: ModuleType, version: str):
        self.root, self.version, self.rows = root, version, table()

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "natten":  # someone took it out of `sys.modules`
            return self.root.__spec__
        if name.startswith("natten."):
            # An ImportError of another kind would be taken for an absent module, and lose its text.
            raise ImportError(why_not(self.version, name, self.rows), name=name)
        return hub.spec_with_repair(name, path, self)

    def find_distributions(self, context=None) -> Iterator[importlib.metadata.Distribution]:
        distribution = getattr(context, "name", None)
        if distribution is None or distribution.lower() == "natten":
            yield _Metadata(self.root.__version__)


_finder: _Finder | None = None
_replaced: dict[str, ModuleType] = {}


def _of_natten() -> dict[str, ModuleType]:
    return {name: each for name, each in sys.modules.items() if name.partition(".")[0] == "natten"}


def _submodules(module: ModuleType) -> Iterator[ModuleType]:
    yield module
    for each in list(vars(module).values()):
        if isinstance(each, ModuleType) and each.__name__.startswith(f"{module.__name__}."):
            yield from _submodules(each)


def _refuse_to_shadow(release: str, root: ModuleType) -> None:
    """Raise an ImportError that says which natten is there, and what it lacks."""
    try:
        version = importlib.metadata.version("natten")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    try:
        functional = importlib.import_module("natten.functional")
    except Exception as error:  # a broken build may raise anything
        state = f"it does not import ({type(error).__name__}: {error})"
    else:
        lacking = sorted(name for name in vars(root.functional) if name[0] != "_" and not hasattr(functional, name))
        state = f"it lacks {', '.join(lacking)} of natten.functional" if lacking else "it has every function of that"
    raise ImportError(
        f"natten {version} is installed, and {state}; to take its place nevertheless, call "
        f"foveate.natten.install(release={release!r}, replace=True)"
    )


def install(release: str = "0.17", replace: bool = False) -> ModuleType:
    """Put a release's namespace in place of an absent ``natten``, for every later import of this process.

    Args:
        release: As in `release`, by default a line that has the names which transformers imports.
        replace: Whether to take the place of a natten that is installed.

    What has been imported from elsewhere before stays with those who imported it. transformers' DiNAT is repaired, now
    or when it is imported, and asked again whether natten is there. Installing another release replaces the former.

    Returns:
        The namespace, as ``import natten`` gives it from now on.

    Raises:
        ImportError: If a natten is installed and ``replace`` is not set; the message says what it lacks.
        ValueError: If no such release is served.
    """
    global _finder
    root = namespace(release)
    if _finder is not None:
        if _finder.root is root:
            return root
        taken = dict(_replaced)
        uninstall()
        replace = replace or bool(taken)
    if not replace and ("natten" in sys.modules or importlib.util.find_spec("natten") is not None):
        _refuse_to_shadow(release, root)
    _replaced.update(_of_natten())
    for name in _replaced:
        del sys.modules[name]
    for module in _submodules(root):
        sys.modules[module.__name__] = module
    _finder = _Finder(root, release)
    sys.meta_path.insert(0, _finder)
    importlib.invalidate_caches()
    hub.repair_imported()
    return root


def uninstall() -> None:
    """Take away what `install` put there, and put back what was there before; nothing if nothing is installed."""
    global _finder
    if _finder is None:
        return
    sys.meta_path.remove(_finder)
    _finder = None
    for name in _of_natten():
        del sys.modules[name]
    sys.modules.update(_replaced)
    _replaced.clear()
    hub.undo_repair()
