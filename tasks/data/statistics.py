"""Mean and standard deviation of a training set's channels, for images that no published statistics are of."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .images import LOOKED_AT, DamagedImageError


def measure_normalization(image: Callable[[int], Any], count: int) -> dict[str, tuple[float, ...]]:
    """Return ``mean`` and ``std`` of each channel, of pixels of 0 to 1, over up to 100 images, evenly spread.

    Args:
        image: Returns an image, given by its number; those that are damaged are left out.
        count: How many there are.

    Raises:
        DamagedImageError: If none can be read.
    """
    total = squares = pixels = 0
    fault: DamagedImageError | None = None
    for index in sorted({place * count // LOOKED_AT for place in range(LOOKED_AT)}):
        try:
            values = np.asarray(image(index)).astype(np.float64) / 255
        except DamagedImageError as error:
            fault = error
            continue
        values = values.reshape(values.shape[0] * values.shape[1], -1)
        total, squares, pixels = total + values.sum(0), squares + (values**2).sum(0), pixels + len(values)
    if not pixels:
        raise fault or DamagedImageError("there is no image to measure mean and std of")
    mean = total / pixels
    # A channel that is the same everywhere says nothing, whatever divides it.
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-6))
    return {"mean": tuple(np.round(mean, 6).tolist()), "std": tuple(np.round(std, 6).tolist())}


def describe_normalization(measured: dict[str, tuple[float, ...]]) -> str:
    """Return in a line what was measured."""
    listed = (", ".join(f"{value:.3f}" for value in measured[key]) for key in ("mean", "std"))
    return "mean {} and std {} of the channels, measured on the training images".format(*listed)
