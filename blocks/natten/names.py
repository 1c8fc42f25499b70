"""Which names each release of NATTEN had, and the namespaces that have them."""

import functools
import re
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import extras, switches, v014, v015, v017, v020

RELEASES = (
    *("0.14.1", "0.14.2", "0.14.3", "0.14.4", "0.14.5", "0.14.6", "0.15.0", "0.15.1"),
    *("0.17.0", "0.17.1", "0.17.2", "0.17.3", "0.17.4", "0.17.5", "0.20.0", "0.20.1"),
    *("0.21.0", "0.21.1", "0.21.2", "0.21.3", "0.21.4", "0.21.5", "0.21.6", "0.21.7"),
)
LINES = ("0.14", "0.15", "0.17", "0.20", "0.21")

# What NATTEN had and nobody gets here: the name, or how it begins, and why.
REFUSED = {
    "natten.libnatten": "NATTEN's compiled entry points are not served; call natten.functional",
    "natten._C": "NATTEN's compiled entry points are not served; call natten.functional",
    "natten._libnatten": "NATTEN's compiled entry points are not served; call natten.functional",
    "natten.autotuner": "there are no kernels of NATTEN's to tune",
    "natten.profiler": "there are no kernels of NATTEN's to profile; see `foveate bench kernels`",
    "natten.backends": "there are no kernels of NATTEN's here; see foveate.kernels.neighborhood_backends",
    "natten.get_": "there are no kernels of NATTEN's whose tiles could be listed",
    "natten.ops.": "it was internal to NATTEN; call natten.functional with additional keys",
    "natten.utils.testing": "NATTEN's own tests are not served",
    "natten.utils.varlen": "packed sequences of several lengths are not served",
    "natten.utils.": "it was internal to NATTEN",
    "natten.context.": "it was internal to NATTEN",
    "natten.types.": "it names no type that a call here takes",
}

Table = list[tuple[str, str, str, dict[str, object]]]


def _pick(module: ModuleType, *patterns: str) -> dict[str, object]:
    """Return a line's objects whose names match."""
    return {name: each for name, each in vars(module).items() if any(re.fullmatch(p, name) for p in patterns)}


def _early(line: ModuleType) -> dict[str, object]:
    """Return the modules of a line as they were before their arguments changed."""
    return {name.removeprefix("Early"): each for name, each in _pick(line, r"EarlyNeighborhood\w+").items()}


def table() -> Table:
    """Return rows of module, first and last release, and names; of rows that say the same name, the last holds."""
    on = switches.Switches()
    modules = r"NeighborhoodAttention\dD"
    halves_015 = _pick(v015, r"na\dd_(qk|av|qk_with_bias)", r"Neighborhood\w+Function")
    old_names = _pick(v015, r"natten\dd(qkrpb|qk|av)")
    context = {
        "MemoryUsagePreference": switches.MemoryUsagePreference,
        **on.named(*switches.SINCE_015, *switches.SINCE_017, *switches.KEPT),
    }
    early, late = v017.FUSED_FUNCTIONS[False], v017.FUSED_FUNCTIONS[True]
    utils = {**extras.UTILS, "check_all_args": extras.check_all_args}
    rows: Table = [
        ("", "0.14.1", "0.14.4", {**_early(v014), "NeighborhoodAttention": v014.NeighborhoodAttention}),
        ("", "0.14.5", "0.14.6", _pick(v014, modules)),
        ("functional", "0.14.1", "0.14.6", _pick(v014, r"natten\dd(qkrpb|av)", r"NATTEN\w+Function")),
        ("functional", "0.14.6", "0.14.6", _pick(v014, r"natten\ddqk")),
        ("flops", "0.14.1", "0.14.6", extras.counts("qk_rpb_flop", "av_flop", "qk_1d_rpb_flop", "av_1d_flop")),
        ("", "0.15.0", "0.15.1", {**_pick(v015, modules), **on.named(*switches.SINCE_015)}),
        ("functional", "0.15.0", "0.15.1", {**halves_015, **on.named(*switches.SINCE_015)}),
        ("functional", "0.15.0", "0.17.4", old_names),
        ("utils", "0.15.0", "0.15.1", {}),
        ("utils.typing", "0.15.0", "0.15.1", {"NoneType": extras.NoneType}),
        (
            "flops",
            "0.15.0",
            "0.17.3",
            extras.counts(*(f"{half}flop" for i in (1, 2, 3) for half in (f"qk_{i}d_rpb_", f"av_{i}d_"))),
        ),
        ("flops", "0.14.1", "0.17.5", {"add_natten_handle": extras.add_natten_handle, "get_flops": extras.get_flops}),
        (
            "flops",
            "0.17.4",
            "0.17.5",
            {
                "fna_flop_count": extras.fna_flop_count,
                "na_qk_flop_count": extras.na_qk_flop_count,
                "na_av_flop_count": extras.na_av_flop_count,
            },
        ),
        ("ops", "0.15.1", "0.17.3", {}),
        ("ops", "0.17.4", "0.17.5", {"merge_attentions": v017.merge_attentions}),
        ("", "0.17.0", "0.17.5", {**_pick(v017, modules), **context}),
        ("", "0.17.5", "0.17.5", on.named(*switches.SINCE_0175)),
        ("functional", "0.17.0", "0.17.5", _pick(v017, r"na\dd(_qk|_av)?", r"NeighborhoodAttention\w+Function")),
        ("functional", "0.17.0", "0.17.3", early),
        ("functional", "0.17.4", "0.17.5", late),
        ("context", "0.17.0", "0.17.5", context),
        ("context", "0.17.5", "0.17.5", on.named(*switches.SINCE_0175)),
        ("types", "0.17.0", "0.17.5", {**extras.TYPES, **extras.OLD_TYPES}),
        ("utils", "0.17.0", "0.17.5", utils),
        ("utils.log", "0.17.0", "0.21.7", {"get_logger": extras.get_logger}),
        ("experimental", "0.17.4", "0.17.5", _pick(v017, r"na\dd")),
        ("types", "0.20.0", "0.21.7", {**extras.TYPES, **extras.NEW_TYPES}),
        ("utils", "0.20.0", "0.21.7", {**extras.UTILS, "check_all_args": extras.check_all_args_with_stride}),
        ("context", "0.20.0", "0.21.7", {**on.named(*switches.KEPT, *switches.SINCE_020)}),
        ("context", "0.20.0", "0.21.7", {"MemoryUsagePreference": switches.MemoryUsagePreference}),
        ("", "0.20.0", "0.20.0", _early(v020)),
        ("", "0.20.1", "0.21.7", _pick(v020, modules)),
    ]
    for module in ("", "functional"):
        rows.append((module, "0.20.0", "0.21.7", _pick(v020, r"na\dd", "merge_attentions")))
        rows.append((module, "0.20.0", "0.21.4", {"attention": v020.early_attention}))
        rows.append((module, "0.21.5", "0.21.7", {"attention": v020.attention}))
    rows.append(("", "0.20.0", "0.21.7", {"HAS_LIBNATTEN": False, **on.named(*switches.KEPT, *switches.SINCE_020)}))
    for i in (1, 2, 3):
        name = f"NeighborhoodAttention{i}D"
        if i < 3:
            rows.append((f"natten{i}d", "0.14.1", "0.14.4", {name: _early(v014)[name]}))
            rows.append((f"natten{i}d", "0.14.5", "0.14.6", {name: getattr(v014, name)}))
        rows.append((f"natten{i}d", "0.15.0", "0.15.1", {name: getattr(v015, name)}))
        for module in (f"natten{i}d", f"na{i}d"):
            rows.append((module, "0.17.0", "0.17.5", {name: getattr(v017, name)}))
    return rows


def _key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _span(release: str) -> tuple[str, str]:
    """Return the first and the last release that a request names: one, or a line.

    Raises:
        ValueError: If NATTEN had no such release, or it is not served.
    """
    if not isinstance(release, str):
        raise ValueError(f'a release is named by text, as "0.17"; got {release!r}')
    of_line = [each for each in RELEASES if each == release or each.startswith(f"{release}.")]
    if not of_line or (release not in LINES and release not in RELEASES):
        raise ValueError(
            f"no release {release!r} of NATTEN is served; there are the lines {', '.join(LINES)} and their releases, "
            f"{RELEASES[0]} to {RELEASES[-1]}"
        )
    return of_line[0], of_line[-1]


class NamespaceLoader(Loader):
    """The loader of a namespace's modules, which are there already."""

    def __init__(self, module: ModuleType):
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module that the spec belongs to."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is complete."""


def why_not(version: str, name: str, rows: Table) -> str:
    """Return why a release's namespace has no such name, in one line."""
    path, _, leaf = name.removeprefix("natten").removeprefix(".").rpartition(".")
    start = f"foveate's natten {version} has no {name}"
    spans = [row[1:3] for row in rows if (row[0] == path and leaf in row[3]) or row[0] == f"{path}.{leaf}".strip(".")]
    if spans:
        first, last = (pick(_key(span[i]) for span in spans) for i, pick in ((0, min), (1, max)))
        dotted = [".".join(map(str, each)) for each in (first, last)]
        until = f"from {dotted[0]} to {dotted[1]}" if dotted[0] != dotted[1] else f"in {dotted[0]}"
        return f"{start}, which NATTEN had {until}; choose another release by foveate.natten.install or release"
    reason = next((why for prefix, why in REFUSED.items() if name.startswith(prefix)), None)
    return f"{start}: {reason}" if reason else start


def _attribute_of(module: str, version: str, rows: Table) -> Callable[[str], object]:
    def __getattr__(name: str) -> object:
        raise AttributeError(why_not(version, f"{module}.{name}", rows), name=name)

    return __getattr__


def _module(name: str, version: str, rows: Table, doc: str) -> ModuleType:
    module = ModuleType(name, doc)
    # With a path, even an empty one, `from module import name` asks the finder, who says why there is no such name.
    module.__path__ = []
    module.__package__ = name
    module.__spec__ = ModuleSpec(name, NamespaceLoader(module), origin="foveate.natten", is_package=True)
    module.__loader__ = module.__spec__.loader
    module.__getattr__ = _attribute_of(name, version, rows)
    return module


@functools.cache
def release(version: str = "0.17") -> ModuleType:
    """Return NATTEN's names, layouts and argument orders as a release had them, on foveate's operators.

    Args:
        version: A release line (``"0.14"``, ``"0.15"``, ``"0.17"``, ``"0.20"``, ``"0.21"``) with the names of all its
            releases and the argument orders of the last one, or a release by itself, as ``"0.14.4"``.

    Returns:
        A module ``natten`` that is in no table of Python's: with ``functional``, ``NeighborhoodAttention1D``, ...,
        ``__version__``, and the submodules that the release had, as attributes.

    Raises:
        ValueError: If no such release is served.

    Example:
        >>> natten = release("0.15")
        >>> q = k = torch.randn(1, 2, 7, 9, 16)  # heads first
        >>> natten.functional.na2d_qk_with_bias(q, k, torch.zeros(2, 5, 5), 3, 1).shape
        torch.Size([1, 2, 7, 9, 9])
    """
    first, last = map(_key, _span(version))
    rows = table()
    release_rows = [row for row in rows if _key(row[1]) <= last and first <= _key(row[2])]
    root = _module("natten", version, rows, f"NATTEN {version}'s names, served by foveate.")
    root.__version__ = _span(version)[1]
    modules = {"": root}
    for path in sorted({row[0] for row in release_rows} - {""}):
        module = _module(f"natten.{path}", version, rows, f"natten.{path} of {version}, served by foveate.")
        modules[path] = module
        parent, _, leaf = path.rpartition(".")
        setattr(modules[parent], leaf, module)
    for path, _, _, names in release_rows:
        for name, value in names.items():
            setattr(modules[path], name, value)
    root.__all__ = sorted(name for name in vars(root) if not name.startswith("_"))
    return root
