"""Images from wherever they are: files, folders, globs, addresses, bytes, arrays, Pillow's images, and videos."""

import http.client
import io
import os
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from ...zoo.library_errors import first_line
from .. import TaskError
from .images import FULL_WHITE, Bands, DamagedImageError, find_images, read_image, to_pixels
from .video import Video, is_video

# Of an address no more is read.
MAX_BYTES = 1 << 28
MAX_SECONDS = 60
_TIMEOUT = 30  # seconds of silence
Source = str | os.PathLike | bytes | np.ndarray | Image.Image | Video


def expand_sources(
    source: Source | Sequence[Source], every: int = 1
) -> Iterator[tuple[str, Callable[[int, int], Image.Image]]]:
    """Yield for every image its name and what reads it, upright, with so many channels and such a white.

    Args:
        source: A path, a folder, a glob, an address, bytes of a file, an array ``[H, W]``, ``[H, W, 3]`` (RGB) or
            ``[H, W, 4]`` (RGBA) of uint8 or uint16, an image of Pillow's, a video, or a list of these.
        every: Which of a video's frames are images: the first, and every so-manyth after it.

    Raises:
        TaskError: If something is none of these, doesn't exist or holds no image.
    """
    several = isinstance(source, Sequence) and not isinstance(source, str | bytes)
    for number, item in enumerate(source if several else [source]):
        if is_address(item):
            yield item, lambda channels, white, item=item: read_address(item, channels, white)
        elif isinstance(item, Video) or is_video(item):
            video = item if isinstance(item, Video) else Video(item)
            for frame, image in video.frames(every):
                name = f"{video.name}, frame {frame}"
                yield name, lambda channels, white, image=image, name=name: to_pixels(image, channels, white, name)
        elif isinstance(item, str | os.PathLike):
            for path in find_images([item]):
                yield str(path), lambda channels, white, path=path: read_image(path, channels, white)
        elif isinstance(item, bytes | bytearray):
            name = f"image {number}"
            yield (
                name,
                lambda channels, white, item=item, name=name: read_image(io.BytesIO(item), channels, white, name),
            )
        elif isinstance(item, np.ndarray | Image.Image):
            name = getattr(item, "filename", "") or f"image {number}"
            yield (
                name,
                lambda channels, white, item=item, name=name: to_pixels(
                    _open(item, name, channels), channels, white, name
                ),
            )
        else:
            raise TaskError(
                f"image {number}: is of type {type(item).__name__}; images are paths, addresses, bytes, arrays or "
                "Pillow's images"
            )


def is_address(source: object) -> bool:
    """Return whether a source is an address of an image on the network."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def read_address(address: str, channels: int = 3, white: int = FULL_WHITE) -> Image.Image | Bands:
    """Return the image that an address holds, as `read_image` does of a file.

    Raises:
        DamagedImageError: If it can't be had within a minute, is larger than 256 MB, or is no image.
    """
    return read_image(io.BytesIO(fetch(address)), channels, white, address)


def fetch(address: str) -> bytes:
    """Return what an address holds.

    Raises:
        DamagedImageError: If it can't be had within a minute, or is larger than 256 MB.
    """
    request = urllib.request.Request(address, headers={"User-Agent": "foveate"})
    large = DamagedImageError(f"{address}: is larger than {MAX_BYTES >> 20} MB; download it, and give the file")
    end, content = time.monotonic() + MAX_SECONDS, bytearray()
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            said = answer.headers.get("Content-Length") or ""
            if said.isdecimal() and int(said) > MAX_BYTES:
                raise large
            # As it comes: a host that sends byte after byte would never meet a limit on a silence.
            while piece := answer.read1(1 << 16):
                content += piece
                if len(content) > MAX_BYTES:
                    raise large
                if time.monotonic() > end:
                    raise TimeoutError(f"it took longer than {MAX_SECONDS} s; download it, and give the file")
    except TaskError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DamagedImageError(f"{address}: can't be had ({first_line(error)})") from error
    if said.isdecimal() and len(content) < int(said):
        raise DamagedImageError(f"{address}: can't be had (it ended after {len(content)} of {said} bytes)")
    return bytes(content)


def _open(item: np.ndarray | Image.Image, name: str, channels: int) -> Image.Image | np.ndarray:
    if isinstance(item, Image.Image):
        return item
    if channels not in (1, 3) and item.ndim == 3 and item.dtype in (np.uint8, np.uint16) and item.size:
        return item  # as many channels as a model takes; of 16 bits, too
    fits = item.dtype == np.uint8 and (item.ndim == 2 or (item.ndim == 3 and item.shape[-1] in (3, 4)))
    if not (fits or (item.dtype == np.uint16 and item.ndim == 2)) or item.size == 0:
        raise TaskError(
            f"{name}: is an array {list(item.shape)} of {item.dtype}; images are [H, W], [H, W, 3] or [H, W, 4] of "
            "uint8, RGB, or [H, W] of uint16"
        )
    return Image.fromarray(np.ascontiguousarray(item))
