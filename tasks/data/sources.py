"""Images from wherever they are: files, folders, globs, addresses, bytes, arrays, Pillow's images, and videos."""

import io
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from ...zoo.library_errors import first_line
from .. import TaskError
from .images import DamagedImageError, find_images, open_picture, read_image, to_pixels
from .video import Video, is_video

# Of an address no more is read.
MAX_BYTES = 1 << 28
_TIMEOUT = 30  # seconds
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
        if isinstance(item, str) and item.startswith(("http://", "https://")):
            yield item, _reader_of(item)
        elif isinstance(item, Video) or is_video(item):
            video = item if isinstance(item, Video) else Video(item)
            for frame, image in video.frames(every):
                name = f"{video.name}, frame {frame}"
                yield name, lambda channels, white, image=image, name=name: to_pixels(image, channels, white, name)
        elif isinstance(item, str | os.PathLike):
            for path in find_images([item]):
                yield str(path), lambda channels, white, path=path: read_image(path, channels, white)
        elif isinstance(item, bytes | bytearray | np.ndarray | Image.Image):
            name = getattr(item, "filename", "") or f"image {number}"
            yield (
                name,
                lambda channels, white, item=item, name=name: to_pixels(_open(item, name), channels, white, name),
            )
        else:
            raise TaskError(
                f"image {number}: is of type {type(item).__name__}; images are paths, addresses, bytes, arrays or "
                "Pillow's images"
            )


def _reader_of(address: str) -> Callable[[int, int], Image.Image]:
    return lambda channels, white: to_pixels(_open(fetch(address), address), channels, white, address)


def fetch(address: str) -> bytes:
    """Return what an address holds.

    Raises:
        DamagedImageError: If it can't be had, or is larger than 256 MB.
    """
    request = urllib.request.Request(address, headers={"User-Agent": "foveate"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            content = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise DamagedImageError(f"{address}: can't be had ({first_line(error)})") from error
    if len(content) > MAX_BYTES:
        raise DamagedImageError(f"{address}: is larger than {MAX_BYTES >> 20} MB; download it, and give the file")
    return content


def _open(item: bytes | np.ndarray | Image.Image, name: str) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, np.ndarray):
        fits = item.dtype == np.uint8 and (item.ndim == 2 or (item.ndim == 3 and item.shape[-1] in (3, 4)))
        if not (fits or (item.dtype == np.uint16 and item.ndim == 2)) or item.size == 0:
            raise TaskError(
                f"{name}: is an array {list(item.shape)} of {item.dtype}; images are [H, W], [H, W, 3] or [H, W, 4] of "
                "uint8, RGB, or [H, W] of uint16"
            )
        return Image.fromarray(np.ascontiguousarray(item))
    try:
        picture = open_picture(io.BytesIO(item))
        picture.load()
        return picture
    except TaskError as error:
        raise DamagedImageError(f"{name}: {str(error).partition(': ')[2]}") from error
    except Exception as error:
        raise DamagedImageError(f"{name}: not an image, or damaged ({first_line(error)})") from error
