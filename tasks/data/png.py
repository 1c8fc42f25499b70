"""PNGs with colours of 16 bits, decoded band by band: OpenCV 5 holds such a picture twice while it decodes it."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {2: 3, 6: 4}  # of the kinds of colour
_PIECE = 1 << 20
# Of rows that are decoded at once.
BAND_BYTES = 1 << 21


def read_deep_png(path: str | Path) -> np.ndarray | None:
    """Return colours of 16 bits as they are stored, ``[H, W, 3 or 4]``, in little more memory than they take.

    Returns:
        uint16; None of any other file, and of interlaced ones and those with a transparent colour.

    Raises:
        ValueError: If it is damaged.
    """
    with open(path, "rb") as file:
        if file.read(8) != SIGNATURE or (head := file.read(25))[4:8] != b"IHDR" or len(head) < 25:
            return None
        width, height = (int.from_bytes(head[place : place + 4], "big") for place in (8, 12))
        depth, kind, _, _, interlaced = head[16:21]
        if depth != 16 or kind not in _CHANNELS or interlaced or _begins_with(file, b"tRNS"):
            return None
        stride = 1 + width * _CHANNELS[kind] * 2
        values = np.empty((height, width, _CHANNELS[kind]), np.uint16)
        # A row is told by its difference to the one above it.
        above, start, waiting = bytes(stride), 0, bytearray()
        count = max(1, BAND_BYTES // stride)
        for piece in _inflated(file):
            waiting += piece
            while start < height and len(waiting) >= stride * min(count, height - start):
                rows = min(count, height - start)
                band = _decode(above + bytes(waiting[: stride * rows]), width, rows + 1, kind)[1:]
                values[start : start + rows] = band
                above, start = b"\0" + band[-1].astype(">u2").tobytes(), start + rows
                del waiting[: stride * rows]
    if start < height:
        raise ValueError(f"it ends after {start} of {height} rows")
    return values


def _begins_with(file: BinaryIO, name: bytes) -> bool:
    """Return whether a kind of chunk comes before the pixels, to which the file is left open."""
    place, there = file.tell(), False
    while (kind := (head := file.read(8))[4:]) not in (b"IDAT", b"IEND", b""):
        there |= kind == name
        place = file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    file.seek(place)
    return there


def _inflated(file: BinaryIO) -> Iterator[bytes]:
    """Yield the filtered rows of the chunks that follow, piece by piece."""
    inflater = zlib.decompressobj()
    while len(head := file.read(8)) == 8 and head[4:] == b"IDAT":
        left, check = int.from_bytes(head[:4], "big"), zlib.crc32(b"IDAT")
        while left:
            content = file.read(min(left, _PIECE))
            if not content:
                raise ValueError("it is cut off")
            left, check = left - len(content), zlib.crc32(content, check)
            while content:
                try:
                    yield inflater.decompress(content, _PIECE)
                except zlib.error as error:
                    raise ValueError(str(error)) from error
                content = inflater.unconsumed_tail
        if file.read(4) != check.to_bytes(4, "big"):
            raise ValueError("a checksum is wrong")
    yield inflater.flush()


def _decode(rows: bytes, width: int, height: int, kind: int) -> np.ndarray:
    """Return filtered rows as colours, by a PNG of their own."""
    import cv2

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, kind, 0, 0, 0])
    content = SIGNATURE + b"".join(
        len(part).to_bytes(4, "big") + name + part + zlib.crc32(name + part).to_bytes(4, "big")
        for name, part in ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    )
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.shape != (height, width, _CHANNELS[kind]) or values.dtype != np.uint16:
        raise ValueError("colours of 16 bits that can't be decoded")
    return values[..., [2, 1, 0, 3][: values.shape[-1]]]
