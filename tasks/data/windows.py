"""Windows of a picture of any size: of a TIFF its parts that are touched, of another file its one decoded form."""

from itertools import pairwise
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from .bands import bands_of, check_channels
from .images import FULL_WHITE, Bands, DeepColours, deep_colours, naming_damage, open_picture, read_image, to_pixels
from .tiff import Tiff, is_tiff


class Windows:
    """A picture that is read by windows, upright.

    A TIFF that is stored in tiles or strips is never held as a whole, and may have any number of pixels; any other
    picture is decoded once, and made 8-bit grey or RGB window by window.

    Attributes:
        width: Columns of the upright picture.
        height: Its rows.

    Args:
        path: Image file, or an upright image.
        channels: Of the windows: 1 for grey, 3 for RGB, others as they are.
        white: As for `read_image`.

    Raises:
        DamagedImageError: If the file is missing, not an image, damaged or, decoded as a whole, larger than
            `open_picture` allows.
    """

    def __init__(self, path: str | Path | Image.Image | Bands, channels: int = 3, white: int = FULL_WHITE):
        self._channels, self._white = channels, white
        is_image = isinstance(path, Image.Image | Bands)
        self._path, self._tiff = "the image" if is_image else path, None
        if not is_image and is_tiff(path):
            tiff = Tiff(path)
            self._tiff = tiff if tiff.is_split else None
            if channels not in (1, 3):
                check_channels(tiff.channels, channels, path)
        if self._tiff is not None:
            size, self._orientation = (self._tiff.width, self._tiff.height), self._tiff.orientation
        else:
            self._image, self._orientation = (path, 1) if is_image else self._decode(path)
            size = self._image.size
        self._stored = size
        self.width, self.height = size[::-1] if self._orientation in (5, 6, 7, 8) else size

    def _decode(self, path: str | Path) -> tuple[Image.Image | Bands | DeepColours, int]:
        """Return the decoded picture as it is stored, and its orientation."""
        if self._channels not in (1, 3):
            return read_image(path, self._channels, self._white), 1
        if self._white != FULL_WHITE and (deep := deep_colours(path)) is not None:
            return deep, deep.orientation
        with naming_damage(path), open_picture(path) as image:
            image.load()
        return image, image.getexif().get(ExifTags.Base.Orientation, 1)

    def read(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        """Return a window, which lies inside, as `read_image` reads the whole.

        Raises:
            DamagedImageError: If the part of the file can't be decoded.
        """
        width, height = self._stored
        # Where a corner of the upright picture lies in the stored one.
        stored = {
            2: (width - right, top, width - left, bottom),
            3: (width - right, height - bottom, width - left, height - top),
            4: (left, height - bottom, right, height - top),
            5: (top, left, bottom, right),
            6: (top, height - right, bottom, height - left),
            7: (width - bottom, height - right, width - top, height - left),
            8: (width - bottom, left, width - top, right),
        }.get(self._orientation, (left, top, right, bottom))
        if self._tiff is not None and self._channels not in (1, 3):
            return bands_of(self._tiff, stored, self._white)
        if self._tiff is not None:
            window = self._tiff.picture(*stored, self._channels, self._white)
            if self._orientation in range(2, 9):
                window.getexif()[ExifTags.Base.Orientation] = self._orientation
                window = ImageOps.exif_transpose(window)
            return window
        if isinstance(self._image, DeepColours):
            return to_pixels(self._image.crop(stored, self._white), self._channels, self._white, self._path)
        # A crop keeps the entry on orientation, and is turned by it.
        return to_pixels(self._image.crop(stored), self._channels, self._white, self._path)


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Return where tiles begin that cover ``length`` pixels, the last shifted back into it.

    Args:
        length: Of the picture.
        size: Of a tile.
        overlap: Least number of pixels that neighbors share.
    """
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return [place * (length - size) // (count - 1) for place in range(count)]


def own_parts(places: list[int], size: int, length: int) -> list[tuple[int, int]]:
    """Return the part of the length that each tile decides: neighbors share what both see in the middle."""
    cuts = [0, *((low + size + high) // 2 for low, high in pairwise(places)), length]
    return list(pairwise(cuts))
