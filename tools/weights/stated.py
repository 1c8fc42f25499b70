"""What is known of published weights, in words."""

from collections.abc import Mapping
from pathlib import Path


def numbers(stated: Mapping[str, float]) -> str:
    """Return numbers with their names."""
    return ", ".join(f"{name} {value:g}" for name, value in stated.items())


def beside(entry, name: str, value: float) -> str:
    """Return what the authors state of a measured number, and by how much it differs."""
    stated = entry and entry.stated.get(name)
    return f"; its authors state {stated:g}, {value - stated:+.2f}" if stated else ""


def file_here(entry) -> Path | None:
    """Return the file in the cache, if it is there and is what it was."""
    from ...zoo import weights

    try:
        return weights.cached(entry)
    except weights.WeightsError:
        return None
