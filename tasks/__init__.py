"""What turns a backbone into a trained solution: data, losses, metrics, the engine, predictions and pictures."""

import difflib
from collections.abc import Iterable


class TaskError(ValueError):
    """What was asked for cannot be done; the message says why and what can, in one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` with the known name nearest to ``name``, or what there is if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
