"""Small real data sets, installed with the package; ``README.md`` beside this file gives sources and licenses."""

import gzip
from importlib.resources import files

import numpy as np
from PIL import Image

DIGITS_TRAIN = 1400  # the first 1400 digits train, the other 397 are held out


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return UCI's handwritten digits.

    Returns:
        Images ``[1797, 8, 8]``, uint8 of 0 (paper) to 16 (ink), and classes ``[1797]``, int64 of 0 to 9.
    """
    with (files(__package__) / "digits.csv.gz").open("rb") as raw, gzip.open(raw, "rt") as rows:
        table = np.loadtxt(rows, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8).astype(np.uint8), table[:, -1]


def load_nuclei() -> tuple[np.ndarray, np.ndarray]:
    """Return a fluorescence micrograph and its annotated nuclei.

    Returns:
        Image ``[512, 512]``, uint16 of 0 to 235, and instances ``[512, 512]``, uint16: 0 is background, each of the
        125 nuclei has a number of its own.
    """

    def read(name: str) -> np.ndarray:
        with (files(__package__) / name).open("rb") as raw, Image.open(raw) as picture:
            return np.asarray(picture, dtype=np.uint16)

    return read("nuclei_image.png"), read("nuclei_labels.png")


def load_nuclei_half(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the left half of the nuclei for ``"train"``, else the right one, ``[512, 256]`` each, as `load_nuclei`.

    The halves share no pixel; the five nuclei on the cut are in both, each time with the part that is there.
    """
    image, instances = load_nuclei()
    part = slice(None, 256) if split == "train" else slice(256, None)
    return np.ascontiguousarray(image[:, part]), np.ascontiguousarray(instances[:, part])


def load_nuclei_patches(split: str, side: int = 32, step: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return square patches of a half of the nuclei, as `load_nuclei_half`, and whether each shows a nucleus.

    A patch shows one if nuclei cover an eighth of it, and none if no pixel is one; what lies between is left out.

    Args:
        split: ``"train"`` or ``"val"``; no pixel is in both.
        side: Of a patch, in pixels.
        step: From a patch to the next one, in pixels.

    Returns:
        Patches ``[n, side, side]``, uint16 of 0 to 235, masks ``[n, side, side]``, bool, and labels ``[n]``, int64: 0
        for background, 1 for a nucleus.
    """
    image, instances = load_nuclei_half(split)
    cut = np.lib.stride_tricks.sliding_window_view
    patches, masks = (
        cut(part, (side, side))[::step, ::step].reshape(-1, side, side) for part in (image, instances > 0)
    )
    share = masks.mean((1, 2))
    is_clear = (share == 0) | (share >= 0.125)
    return patches[is_clear].copy(), masks[is_clear].copy(), (share[is_clear] > 0).astype(np.int64)
