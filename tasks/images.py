"""Finding and reading images; the one reader that training, evaluation and prediction share."""

import glob
import mimetypes
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

from . import TaskError

_READ = ".bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
EXTENSIONS = tuple(sorted([*_READ.split(), *([".avif"] if features.check("avif") else [])]))
# Endings of pictures that Pillow doesn't read and Python's table of types doesn't hold in every version.
_UNREAD = (".arw", ".avif", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef")
# Folders that systems and their tools add: archives of macOS, and the stores and bins of disks and file servers.
SYSTEM_FOLDERS = (
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "@Recycle",
    "@eaDir",
    "System Volume Information",
    "__MACOSX",
    "lost+found",
)


class DamagedImageError(TaskError):
    """An image that is missing, or can't be read; the message names it."""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is one that systems hide, or add, so that it holds no data."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def has_image_name(path: str | Path) -> bool:
    """Return whether the ending is of a picture that can be read, in capitals or not."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def list_images(folder: str | Path) -> list[Path]:
    """Return the images in a folder and below it, through links to folders too, in order of their paths.

    Hidden files and folders and `SYSTEM_FOLDERS` are left out. Pictures of formats that aren't read are left out with a
    warning that counts them.

    Raises:
        TaskError: If a folder is missing or can't be read.
    """
    images, unread = [], Counter()
    for file in _walk(folder):
        ending = os.path.splitext(file)[1].lower()
        if ending in EXTENSIONS:
            images.append(Path(file))
        elif ending in _UNREAD or (mimetypes.guess_type(file)[0] or "").startswith("image/"):
            unread[ending] += 1
    if unread:
        listed = ", ".join(f"{count} {ending}" for ending, count in sorted(unread.items()))
        warnings.warn(
            f"{folder}: pictures of formats that aren't read are left out: {listed}; convert them to .png", stacklevel=2
        )
    return sorted(images)


def _walk(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        return  # a link to a folder that it lies in
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise TaskError(f"{folder}: can't be read as a folder ({error.strerror})") from error
    for entry in found:
        if entry.is_dir():
            yield from _walk(entry.path, (*above, real))
        else:
            yield entry.path


def find_images(sources: Iterable[str | Path]) -> list[Path]:
    """Expand files, folders (as `list_images` does) and globs into image files, in order and without repetition.

    Raises:
        TaskError: If a source doesn't exist or holds no image.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            here = list_images(path)
            if not here:
                raise TaskError(f"{source}: no image in this folder; looked for {', '.join(EXTENSIONS)}")
        elif path.exists():
            here = [path]
        elif glob.has_magic(str(source)):
            here = sorted(Path(file) for file in glob.glob(str(source), recursive=True) if Path(file).is_file())
            if not here:
                raise TaskError(f"{source}: matches no file")
        else:
            raise TaskError(f"{source}: no such file or folder")
        found.update(dict.fromkeys(here))
    return list(found)


def open_picture(path: str | Path) -> Image.Image:
    """Open a picture without decoding it, if it has no more pixels than Pillow, or ``FOVEATE_MAX_PIXELS``, allows.

    Raises:
        DamagedImageError: If it has more pixels; the message says how to allow them.
        TaskError: If the setting is no number.
    """
    setting = os.environ.get("FOVEATE_MAX_PIXELS")
    if setting is not None:
        if not setting.isdecimal() or int(setting) == 0:
            raise TaskError(f"FOVEATE_MAX_PIXELS is {setting!r}, but must be a number of pixels, such as 500000000")
        # Pillow warns beyond this and refuses twice as many.
        Image.MAX_IMAGE_PIXELS = int(setting)
    try:
        picture = Image.open(path)
        if setting is None or picture.width * picture.height <= int(setting):
            return picture
        picture.close()
    except Image.DecompressionBombError:
        pass
    limit = int(setting) if setting is not None else 2 * Image.MAX_IMAGE_PIXELS
    raise DamagedImageError(
        f"{path}: has more than {limit} pixels, which a small file that fills the memory has too; if you trust it, "
        "allow more by the environment variable FOVEATE_MAX_PIXELS"
    )


def read_size(path: str | Path) -> tuple[tuple[int, int], bool]:
    """Return the height and width that `read_image` gives, and whether EXIF turned the picture on its side for it.

    Only the header is read, but for PNGs whose EXIF entry follows the pixels.

    Raises:
        DamagedImageError: If the file is missing, not an image or too large.
    """
    try:
        with open_picture(path) as picture:
            width, height = picture.size
            # Pillow decodes a PNG to find an entry that isn't in front of the pixels.
            known = picture.format != "PNG" or {"exif", "Raw profile type exif", "xmp"} & picture.info.keys()
            exif = picture.getexif() if known or _has_chunk(path, b"eXIf") else {}
            turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            # Pillow opens TIFF with the sides exchanged already.
            return ((width, height) if turned and picture.format != "TIFF" else (height, width)), turned
    except TaskError:
        raise
    except FileNotFoundError:
        raise DamagedImageError(f"{path}: no such file") from None
    except Exception as error:
        raise DamagedImageError(f"{path}: not an image, or damaged ({_reason(error)})") from error


def read_values(path: str | Path) -> np.ndarray:
    """Return the values of a picture of labels, or numbers, as they are in its file, ``[H, W]``; palettes' indices too.

    Raises:
        DamagedImageError: If the file is missing, not an image, damaged, too large, or has several channels.
    """
    try:
        with open_picture(path) as picture:
            values = np.asarray(picture)
    except FileNotFoundError:
        raise DamagedImageError(f"{path}: no such file") from None
    except TaskError:
        raise
    except Exception as error:
        raise DamagedImageError(f"{path}: damaged, or no image ({_reason(error)})") from error
    if values.ndim != 2:
        raise DamagedImageError(f"{path}: is a picture of {values.shape[-1]} channels; a label map has one")
    return values


def _has_chunk(path: str | Path, kind: bytes) -> bool:
    """Return whether a PNG file holds a chunk of a kind, by its chunks' headers alone."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            if header[4:] == kind:
                return True
            file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    return False


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """Read an image of any mode upright, as 8-bit grey or RGB.

    Sixteen bits are scaled by their full range, 65535 to 255; transparency is laid over white; a palette is resolved.

    Args:
        path: Image file.
        channels: 1 for grey (mode ``L``), 3 for ``RGB``.

    Raises:
        DamagedImageError: If the file is missing, not an image, damaged or larger than `open_picture` allows.
        TaskError: If ``channels`` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise TaskError(f"{path}: images are read with 1 or 3 channels, but the model takes {channels}")
    try:
        with open_picture(path) as image:
            image.load()
            # In place, an upright image isn't copied.
            ImageOps.exif_transpose(image, in_place=True)
    except FileNotFoundError:
        raise DamagedImageError(f"{path}: no such file") from None
    except TaskError:
        raise
    except Exception as error:
        raise DamagedImageError(f"{path}: not an image, or damaged ({_reason(error)})") from error
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DamagedImageError(f"{path}: holds 32-bit integers; save it with 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise DamagedImageError(f"{path}: holds floating-point numbers of unknown range; save it with 8 or 16 bits")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")
