"""Where keyword arguments of `create_detector` and `create_segmenter` go: each part of a model names its own options.

A class that such options reach has ``OPTIONS``, the names of those that its constructor takes from there.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol


class Part(Protocol):
    """A class of a dense model's part, such as a head, or the model around it."""

    OPTIONS: ClassVar[tuple[str, ...]]


def split_options(given: Mapping[str, Any], *parts: type[Part]) -> list[dict[str, Any]]:
    """Return the options of each part, and last all others, which are the backbone's."""
    split = [{name: given[name] for name in part.OPTIONS if name in given} for part in parts]
    known = known_options(*parts)
    return [*split, {name: value for name, value in given.items() if name not in known}]


def known_options(*parts: type[Part]) -> list[str]:
    """Return the names of the options of all parts."""
    return list(dict.fromkeys(name for part in parts for name in part.OPTIONS))
