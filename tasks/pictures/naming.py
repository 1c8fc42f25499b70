"""Where the names of objects stand in a picture: at their boxes, none over another."""

from collections.abc import Iterator, Sequence

import numpy as np


def place_names(
    boxes: np.ndarray, sizes: Sequence[tuple[float, float]], width: float, height: float
) -> list[tuple[float, float]]:
    """Return the left and top of each name: at its box, or as near to it as no other name is yet.

    Args:
        boxes: ``[N, 4]``, ``x1, y1, x2, y2`` in pixels.
        sizes: Width and height of each name, in pixels of the picture.
        width: Of the picture.
        height: Of the picture.
    """
    taken: list[tuple[float, float, float, float]] = []
    for box, (across, down) in zip(boxes.tolist(), sizes, strict=True):
        right, bottom = max(0.0, width - across), max(0.0, height - down)
        places = [(min(max(0.0, x), right), min(max(0.0, y), bottom)) for x, y in _places(box, across, down, height)]
        free = ((x, y) for x, y in places if not any(_overlap((x, y, x + across, y + down), other) for other in taken))
        x, y = next(free, places[0])
        taken.append((x, y, x + across, y + down))
    return [(x, y) for x, y, _, _ in taken]


def _places(box: Sequence[float], across: float, down: float, height: float) -> Iterator[tuple[float, float]]:
    """Yield where a name may stand, the best first: above its box, in it, below it, then ever farther away."""
    x1, y1, x2, y2 = box
    for top in (y1 - down, y1, y2, y2 - down):
        yield from ((left, top) for left in (x1, x2 - across))
    for step in range(1, int(height // max(down, 1)) + 1):
        yield from ((x1, top) for top in (y1 + step * down, y1 - (step + 1) * down))


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(one[side] < other[side + 2] and other[side] < one[side + 2] for side in (0, 1))
