"""How far models and files are verified: of the code, of a file, of an accuracy, and never more than is true.

``states.csv`` says of every model what its code was compared with; `.ci/models.py` writes it from the recorded outputs
of the authors' code. What is known of a file stands in its row of ``weights.json``.
"""

import csv
import functools
from collections.abc import Sequence
from pathlib import Path

from .weights import Weights, table

_TABLE = Path(__file__).with_name("states.csv")
_WORDS = {
    "own": "its outputs are those of its authors' code, on rebuilt weights",
    "ours": "ours: there is no other code to compare it with",
    "paper": "written after its paper; no code of its authors was compared",
}


@functools.cache
def _codes() -> dict[str, str]:
    with _TABLE.open(newline="") as file:
        return {row["model"]: row["code"] for row in csv.DictReader(file)}


def code_of(model: str) -> str | None:
    """Return what a model's code was compared with.

    Returns:
        ``"own"``: outputs of its authors' code of this very model. Another model's name: outputs of that one, which is
        of the same code. ``"paper"``, ``"ours"``: nothing. None: the model is none of this package.
    """
    return _codes().get(model)


def code_state(model: str) -> str | None:
    """Return that in a sentence; None of a model that is none of this package."""
    code = code_of(model)
    if code is None or code in _WORDS:
        return _WORDS.get(code)
    return f"outputs of {code}, of the same code, are those of its authors' code"


def code_word(model: str) -> str:
    """Return that in a few words, for tables."""
    code = code_of(model) or "-"
    return {"own": "compared", "paper": "after the paper", "ours": "ours", "-": "-"}.get(code, f"as {code}")


def file_state(entry: Weights) -> str:
    """Return whether a file was opened, and what was measured of it."""
    checked = entry.checked
    if checked is None:
        return "not opened, not measured"
    compared = "" if checked.difference is None else f", {checked.difference:.1e} from the authors' outputs"
    measured = ", ".join(f"{name} {value:g}" for name, value in checked.measured.items())
    measured = f"measured: {measured}" if measured else "not measured"
    return f"opened on {checked.date} by {checked.by}{compared}, {measured}"


def file_word(entry: Weights) -> str:
    """Return that in a word or two, for tables."""
    if entry.checked is None:
        return "not opened"
    return "measured" if entry.checked.measured else "opened"


def family_state(models: Sequence[str]) -> tuple[str, str]:
    """Return what the code of a family's models was compared with, and how many of their files were opened."""
    codes = {code_of(model) for model in models}
    nothing = "nothing: after the papers" if "paper" in codes else "nothing: ours"
    word = "its authors' outputs" if "own" in codes else nothing
    files = [entry for entry in table().values() if entry.model in models]
    opened = sum(entry.checked is not None for entry in files)
    measured = sum(entry.checked is not None and bool(entry.checked.measured) for entry in files)
    if not files:
        return word, "there are none"
    return word, f"{opened} of {len(files)}" + (f", {measured} measured" if measured != opened else "")
