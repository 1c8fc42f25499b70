"""What turns a backbone into a trained solution: data, losses, metrics, the engine, predictions and pictures."""

import difflib
import unicodedata
from collections.abc import Iterable

# Each is a package beside this file, with ``Task`` for the engine and ``Predictor``.
TASKS = ("classify", "detect", "segment")
# Of what an image is resized or cut to, in pixels; more would fill the memory.
LONGEST_SIDE = 16384

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class TaskError(ValueError):
    """What was asked for cannot be done; the message says why and what can, in one line."""


def check_sides(name: str, *sides: int | None) -> None:
    """Raise a TaskError unless lengths that images are resized or cut to are of 1 to `LONGEST_SIDE` pixels, or None."""
    for side in sides:
        if side is not None and not 1 <= side <= LONGEST_SIDE:
            raise TaskError(f"{name} is {side!r}, but must be from 1 to {LONGEST_SIDE}")


def printable(text: str, spared: str = "\n\t") -> str:
    """Return a text of others without what a terminal obeys: control characters but ``spared`` become ``\\x1b``."""
    return "".join(part if part in spared or not _obeyed(part) else ascii(part)[1:-1] for part in text)


def one_line(text: str) -> str:
    """Return a name of others, of a file or a class, as it is printed: as `printable`, and in one line."""
    return printable(text, spared="")


def _obeyed(part: str) -> bool:
    """Return whether a character is a command: a control, or one that turns the direction of what follows."""
    return unicodedata.category(part) in ("Cc", "Cs", "Zl", "Zp") or part in _DIRECTIONS


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` with the known name nearest to ``name``, or what there is if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    # A key may be known by its last part alone.
    near = near or [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}" if known else ""
