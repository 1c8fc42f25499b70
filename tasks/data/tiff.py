"""TIFF by its tiles or strips, as few at once as a window needs, and with more channels than Pillow has modes for.

Each tile or strip (a segment, here) is decoded by Pillow, as the only strip of a small TIFF with the same settings. The
format: TIFF 6.0 (Adobe, 1992).
"""

import io
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ...zoo.library_errors import first_line
from .images import FULL_WHITE, DamagedImageError, read_image, to_bytes

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 259, 262, 274
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR = 273, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_BYTES, _FORMAT = 322, 323, 324, 325, 339
# What says how a segment is decoded: fill order, predictor, palette, kinds of channels, tables and sampling of JPEG.
_KEPT = (_BITS, _COMPRESSION, _PHOTOMETRIC, 266, _SAMPLES, _PREDICTOR, 320, 338, _FORMAT, 347, 529, 530, 531, 532)
# None, LZW, deflate, packed bits, deflate as it was first called, LZMA, Zstandard: what comes out are the samples.
_LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)
_ROWS_READ = 64
_HELD = 1 << 27  # bytes of decoded segments that are kept for the next window


def is_tiff(path: str | Path) -> bool:
    """Return whether a file begins as TIFFs do."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    except OSError:
        return False  # its reader says what is wrong


class Tiff:
    """The first picture of a TIFF, read by windows.

    Attributes:
        height: Rows as they are stored.
        width: Columns as they are stored.
        channels: Samples of a pixel.
        orientation: As EXIF counts it; windows are of the picture as it is stored.
        is_split: Whether it is stored in parts, so that a window needs few of them.

    Args:
        path: File.

    Raises:
        DamagedImageError: If it is no TIFF, or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                header = file.read(8)
                header += file.read(8) if header[2:4] in (b"\x2b\0", b"\0\x2b") else b""
                self._tags = ImageFileDirectory_v2(header)
                file.seek(self._tags.next)
                with warnings.catch_warnings():
                    # Of a directory that is cut off; what is lacking is said below.
                    warnings.simplefilter("ignore")
                    self._tags.load(file)
            self._read_layout()
        except FileNotFoundError:
            raise DamagedImageError(f"{path}: no such file") from None
        except Exception as error:
            raise DamagedImageError(f"{path}: not an image, or damaged ({first_line(error)})") from error
        self._held: OrderedDict[tuple, Image.Image | np.ndarray] = OrderedDict()
        self._held_bytes = 0

    def _read_layout(self) -> None:
        tags = self._tags
        offsets, sizes = (_TILES, _TILE_BYTES) if _TILES in tags else (_STRIPS, _STRIP_BYTES)
        if not {_WIDTH, _LENGTH, offsets, sizes} <= {*tags}:
            raise ValueError("its directory lacks entries")
        self.width, self.height, self.channels = tags[_WIDTH], tags[_LENGTH], tags.get(_SAMPLES, 1)
        self.orientation = tags.get(_ORIENTATION, 1)
        self._planes = self.channels if tags.get(_PLANAR, 1) == 2 else 1
        if _TILES in tags:
            self._segment = tags[_TILE_LENGTH], tags[_TILE_WIDTH]
            offsets, sizes = tags[_TILES], tags[_TILE_BYTES]
        else:
            self._segment = min(tags.get(_ROWS, self.height), self.height), self.width
            offsets, sizes = tags[_STRIPS], tags[_STRIP_BYTES]
        self._offsets, self._sizes = np.atleast_1d(offsets).tolist(), np.atleast_1d(sizes).tolist()
        row = self.width * int(np.sum(tags.get(_BITS, 1))) / 8
        if _TILES not in tags and len(self._offsets) == 1 and tags.get(_COMPRESSION, 1) == 1 and row % 1 == 0:
            # Rows that lie one after the other, as they are, are as good as strips.
            starts = range(0, self.height, _ROWS_READ)
            whole, row = self._sizes[0], int(row)
            self._segment = min(_ROWS_READ, self.height), self.width
            self._offsets = [self._offsets[0] + start * row for start in starts]
            self._sizes = [min(max(whole - start * row, 0), _ROWS_READ * row) for start in starts]
        if min(self.width, self.height, *self._segment, self.channels) < 1:
            raise ValueError("it has no pixels")
        self._across, down = -(-self.width // self._segment[1]), -(-self.height // self._segment[0])
        if min(len(self._offsets), len(self._sizes)) < self._across * down * self._planes:
            raise ValueError(f"{len(self._offsets)} of {self._across * down * self._planes} parts are there")
        self.is_split = self._segment[0] * self._segment[1] < self.height * self.width

    def samples_fault(self) -> str | None:
        """Return why `values` can't be had: samples that aren't whole numbers of 8 or 16 bits; None if they can."""
        bits, kinds = np.unique(self._tags.get(_BITS, 1)).tolist(), np.unique(self._tags.get(_FORMAT, 1)).tolist()
        if self._tags.get(_COMPRESSION, 1) not in _LOSSLESS:
            return f"its compression, {self._tags.get(_COMPRESSION)}, is read for at most 4 channels; save it with LZW"
        if bits not in ([8], [16]) or kinds != [1]:
            return f"holds {self.channels} channels of {bits[-1]} bits; save them as unsigned integers of 8 or 16 bits"
        if self._tags.get(_PREDICTOR, 1) not in (1, 2):
            return "its predictor is for floating-point numbers; save it without one"
        return None

    def picture(
        self, left: int, top: int, right: int, bottom: int, channels: int = 3, white: int = FULL_WHITE
    ) -> Image.Image:
        """Return a window as 8-bit grey or RGB, as `read_image` reads the whole.

        Args:
            left: First column, and so on; the window lies inside.
            top: First row.
            right: Column after the last.
            bottom: Row after the last.
            channels: 1 or 3.
            white: As there.

        Raises:
            DamagedImageError: If a segment can't be decoded.
        """
        if self._planes > 1:
            values = self.values(left, top, right, bottom)
            deep = values.dtype == np.uint16
            values = to_bytes(values[..., :3], white) if deep else values[..., :3]
            image = Image.fromarray(values if values.shape[-1] == 3 else np.ascontiguousarray(values[..., 0]))
            return image.convert("L" if channels == 1 else "RGB")
        window = Image.new("L" if channels == 1 else "RGB", (right - left, bottom - top))
        for row, column in self._touched(left, top, right, bottom):
            part = self._once((row, column, channels, white), lambda place: self._decode(*place))
            y, x = row * self._segment[0], column * self._segment[1]
            inside = (max(left - x, 0), max(top - y, 0), min(right - x, part.width), min(bottom - y, part.height))
            window.paste(part.crop(inside), (x + inside[0] - left, y + inside[1] - top))
        return window

    def values(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Return the samples of a window ``[h, w, C]`` as they are, uint8 or uint16.

        Args:
            left: As for `picture`.
            top: As there.
            right: As there.
            bottom: As there.

        Raises:
            DamagedImageError: If `samples_fault` says so, or a segment can't be decoded.
        """
        fault = self.samples_fault()
        if fault is not None:
            raise DamagedImageError(f"{self.path}: {fault}")
        deep = np.max(self._tags[_BITS]) == 16
        window = np.zeros((bottom - top, right - left, self.channels), np.uint16 if deep else np.uint8)
        each = self.channels // self._planes
        for row, column in self._touched(left, top, right, bottom):
            y, x = row * self._segment[0], column * self._segment[1]
            for plane in range(self._planes):
                part = self._once((row, column, plane), lambda place: self._decode_samples(*place))
                height, width = part.shape[:2]
                rows = slice(max(top - y, 0), min(bottom - y, height))
                columns = slice(max(left - x, 0), min(right - x, width))
                window[
                    y + rows.start - top : y + rows.stop - top,
                    x + columns.start - left : x + columns.stop - left,
                    plane * each : (plane + 1) * each,
                ] = part[rows, columns]
        return window

    def _touched(self, left: int, top: int, right: int, bottom: int) -> list[tuple[int, int]]:
        """Return the row and column of the segments that a window touches."""
        height, width = self._segment
        return [
            (row, column)
            for row in range(top // height, -(-bottom // height))
            for column in range(left // width, -(-right // width))
        ]

    def _once(self, place: tuple, decode):
        """Return a decoded segment, the last of which are kept."""
        if place in self._held:
            self._held.move_to_end(place)
            return self._held[place]
        part = self._held[place] = decode(place)
        self._held_bytes += _bytes_of(part)
        while self._held_bytes > _HELD and len(self._held) > 1:
            self._held_bytes -= _bytes_of(self._held.popitem(last=False)[1])
        return part

    def _decode(self, row: int, column: int, channels: int, white: int) -> Image.Image:
        tags = {tag: self._tags[tag] for tag in _KEPT if tag in self._tags}
        return read_image(io.BytesIO(self._as_file(row, column, 0, self._segment[1], tags)), channels, white, self.path)

    def _decode_samples(self, row: int, column: int, plane: int) -> np.ndarray:
        """Return the samples of a segment ``[h, w, C]``, which one channel as many times as wide brings."""
        each = self.channels // self._planes
        bits = int(np.max(self._tags[_BITS]))
        tags = {_BITS: bits, _COMPRESSION: self._tags.get(_COMPRESSION, 1), _PHOTOMETRIC: 1, _SAMPLES: 1}
        content = self._as_file(row, column, plane, self._segment[1] * each, tags)
        try:
            with Image.open(io.BytesIO(content)) as picture:
                values = np.asarray(picture).astype(np.uint16 if bits == 16 else np.uint8)
        except Exception as error:
            raise DamagedImageError(f"{self.path}: not an image, or damaged ({first_line(error)})") from error
        values = values.reshape(len(values), self._segment[1], each)
        # Differences of neighbors, which wrap around.
        return np.cumsum(values, 1, dtype=values.dtype) if self._tags.get(_PREDICTOR, 1) == 2 else values

    def _as_file(self, row: int, column: int, plane: int, width: int, tags: dict) -> bytes:
        """Return a segment as a TIFF of its own."""
        height = self._segment[0]
        if _TILES not in self._tags:
            height = min(height, self.height - row * height)
        index = plane * len(self._offsets) // self._planes + row * self._across + column
        with open(self.path, "rb") as file:
            file.seek(self._offsets[index])
            content = file.read(self._sizes[index])
        directory = ImageFileDirectory_v2(prefix=self._tags.prefix)
        settings = {_WIDTH: width, _LENGTH: height, _ROWS: height, _STRIPS: 0, _STRIP_BYTES: len(content)}
        for tag, value in {**tags, **settings}.items():
            directory[tag] = value
            if tag in self._tags.tagtype and tag not in settings:
                directory.tagtype[tag] = self._tags.tagtype[tag]
        header = b"II*\0\x08\0\0\0" if self._tags.prefix == b"II" else b"MM\0*\0\0\0\x08"
        return header + directory.tobytes(len(header)) + content


def _bytes_of(part: Image.Image | np.ndarray) -> int:
    if isinstance(part, np.ndarray):
        return part.nbytes
    return part.width * part.height * (1 if part.mode == "L" else 4)
