"""Images of other than one or three channels, as multispectral TIFFs hold: read, made 8-bit and turned upright."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from .images import FULL_WHITE, Bands, DamagedImageError, naming_damage, open_picture, to_bytes
from .tiff import Tiff, is_tiff


def read_bands(path: str | Path | BytesIO, channels: int, white: int = FULL_WHITE, name: str | Path = "") -> Bands:
    """Read an image of so many channels upright: of a TIFF any number of 8 or 16 bits, else those of the picture.

    Args:
        path: Image file; of what it holds, Pillow's pictures alone.
        channels: How many it must have.
        white: As for `read_image`.
        name: For messages.

    Raises:
        DamagedImageError: If it is missing or damaged, or has others.
    """
    if isinstance(path, str | Path) and is_tiff(path):
        tiff = Tiff(path)
        check_channels(tiff.channels, channels, name)
        return bands_of(tiff, (0, 0, tiff.width, tiff.height), white)
    with naming_damage(name), open_picture(path, name) as picture:
        picture.load()
    return as_bands(picture, channels, white, name)


def bands_of(tiff: Tiff, box: tuple[int, int, int, int], white: int) -> Bands:
    """Return a window of a TIFF as it is stored, all its channels as bytes, turned upright."""
    values = tiff.values(*box)
    return Bands(upright(to_bytes(values, white) if values.dtype == np.uint16 else values, tiff.orientation))


def as_bands(image: Image.Image | Bands | np.ndarray, channels: int, white: int, name: str | Path) -> Bands:
    """Return an image of so many channels as bytes.

    Args:
        image: Of Pillow's, with that many bands; or values ``[H, W, C]``, uint8 or uint16.
        channels: How many it must have.
        white: As for `read_image`.
        name: For messages.

    Raises:
        DamagedImageError: If it has others.
    """
    if isinstance(image, Bands):
        check_channels(image.pixels.shape[-1], channels, name)
        return image
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    check_channels(values.shape[-1], channels, name)
    if isinstance(image, Image.Image):
        values = upright(values, image.getexif().get(274, 1))
    return Bands(to_bytes(values, white) if values.dtype == np.uint16 else values)


def check_channels(channels: int, expected: int, name: str | Path) -> None:
    """Raise a DamagedImageError unless an image has the channels that are expected."""
    if channels != expected:
        raise DamagedImageError(f"{name}: has {channels} channels, not {expected}; data.channels says how many to read")


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Return stored pixels ``[H, W, C]`` as EXIF's orientation turns them."""
    if orientation in (5, 6, 7, 8):
        values = values.transpose(1, 0, 2)
    down = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    across = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(values[down, across])
