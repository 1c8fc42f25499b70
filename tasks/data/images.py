"""Finding and reading images; the one reader that training, evaluation and prediction share."""

import contextlib
import glob
import mimetypes
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

from ...zoo.library_errors import first_line, unknown_picture
from .. import TaskError
from .png import read_deep_png

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
# The greatest value of 16 bits, and those of the depths that cameras have.
FULL_WHITE = 65535
DEPTHS = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))
# So many images are looked at to know how deep they are.
LOOKED_AT = 100


class DamagedImageError(TaskError):
    """An image that is missing, or can't be read; the message names it."""


class Bands:
    """An image of any number of channels, as far as Pillow's images are used here.

    Attributes:
        pixels: ``[H, W, C]``, uint8.
    """

    mode = "bands"

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]
        self.size = self.width, self.height

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.pixels if dtype is None else self.pixels.astype(dtype)

    def convert(self, mode: str) -> Image.Image:
        """Return a picture to be looked at: the first three channels as colours, or the first as grey."""
        shown = self.pixels[..., :3] if self.pixels.shape[-1] >= 3 else self.pixels[..., 0]
        return Image.fromarray(np.ascontiguousarray(shown)).convert(mode)

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        """Return a window."""
        left, top, right, bottom = box
        return Bands(self.pixels[top:bottom, left:right])


def channels_beyond(path: str | Path) -> int | None:
    """Return how many channels a TIFF has, if they are more than pictures have, four; None of any other file."""
    tiff = _only_ours(path)
    return None if tiff is None else tiff.channels


def as_picture(image: "Image.Image | Bands") -> Image.Image:
    """Return an image that can be shown: itself, or of bands what `Bands.convert` gives."""
    return image.convert("RGB") if isinstance(image, Bands) else image


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
            visible = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise TaskError(f"{folder}: can't be read as a folder ({error.strerror})") from error
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, (*above, real))
        else:
            yield entry.path


def find_images(sources: Iterable[str | Path]) -> list[Path]:
    """Expand files, folders (as `list_images` does) and globs into image files, in order and without repetition.

    Raises:
        TaskError: If a source doesn't exist or holds no image.
    """
    files: dict[Path, None] = {}
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
        files.update(dict.fromkeys(here))
    return list(files)


def open_picture(path: str | Path | BytesIO, name: str | Path | None = None) -> Image.Image:
    """Open a picture without decoding it, if it has no more pixels than Pillow, or ``FOVEATE_MAX_PIXELS``, allows.

    Args:
        path: Image file, or what it holds.
        name: For messages, of what has no path.

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
    name = path if name is None else name
    limit = int(setting) if setting is not None else 2 * Image.MAX_IMAGE_PIXELS
    raise DamagedImageError(
        f"{name}: has more than {limit} pixels, which a small file that fills the memory has too; if you trust it, "
        "allow more by the environment variable FOVEATE_MAX_PIXELS"
    )


def read_size(path: str | Path) -> tuple[tuple[int, int], bool]:
    """Return the height and width that `read_image` gives, and whether EXIF turned the picture on its side for it.

    Only the header is read, but for PNGs whose EXIF entry follows the pixels.

    Raises:
        DamagedImageError: If the file is missing, not an image or too large.
    """
    tiff = _only_ours(path)
    if tiff is not None:
        turned = tiff.orientation in (5, 6, 7, 8)
        return ((tiff.width, tiff.height) if turned else (tiff.height, tiff.width)), turned
    with naming_damage(path), open_picture(path) as picture:
        width, height = picture.size
        # Pillow decodes a PNG to find an entry that isn't in front of the pixels.
        known = picture.format != "PNG" or {"exif", "Raw profile type exif", "xmp"} & picture.info.keys()
        exif = picture.getexif() if known or _has_chunk(path, b"eXIf") else {}
        turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        # Pillow opens TIFF with the sides exchanged already.
        return ((width, height) if turned and picture.format != "TIFF" else (height, width)), turned


def read_values(path: str | Path | BytesIO, name: str | Path | None = None) -> np.ndarray:
    """Return the values of a picture of labels, or numbers, as they are in its file, ``[H, W]``; palettes' indices too.

    Args:
        path: Image file, or what it holds.
        name: For messages, of what has no path.

    Raises:
        DamagedImageError: If the file is missing, not an image, damaged, too large, or has several channels.
    """
    name = path if name is None else name
    with naming_damage(name), open_picture(path, name) as picture:
        values = np.asarray(picture)
    if values.ndim != 2:
        raise DamagedImageError(f"{name}: is a picture of {values.shape[-1]} channels; a label map has one")
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


@contextlib.contextmanager
def naming_damage(name: str | Path) -> Iterator[None]:
    """Turn what Pillow and the system raise of a picture into a DamagedImageError of one line that names it."""
    try:
        yield
    except TaskError:
        raise
    except FileNotFoundError:
        raise DamagedImageError(f"{name}: no such file") from None
    except Exception as error:
        raise DamagedImageError(f"{name}: not an image, or damaged ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return unknown_picture(error) or first_line(error)


def read_image(
    path: str | Path | BytesIO, channels: int = 3, white: int = FULL_WHITE, name: str | Path | None = None
) -> Image.Image:
    """Read an image of any mode upright, as 8-bit grey or RGB, as `to_pixels` says; other channels as `Bands`.

    Args:
        path: Image file, or what it holds.
        channels: 1 for grey (mode ``L``), 3 for ``RGB``; any other number for images that have so many.
        white: Value of 16-bit pixels that becomes 255; greater ones do too. 8-bit images are as they are.
        name: For messages, of what has no path.

    Raises:
        DamagedImageError: If the file is missing, not an image, damaged or larger than `open_picture` allows, or has
            other channels than asked for.
    """
    name = path if name is None else name
    if channels not in (1, 3):
        from .bands import read_bands

        return read_bands(path, channels, white, name)
    image, colours = _load(path, deep_colours=white != FULL_WHITE, name=name)
    if colours is not None:
        # Of TIFF, both decoders have turned it already, and the entry is gone.
        image = colours_as_image(colours, white, image.getexif().get(ExifTags.Base.Orientation, 1))
    return to_pixels(image, channels, white, name)


def to_pixels(
    image: Image.Image, channels: int = 3, white: int = FULL_WHITE, name: str | Path = "the image"
) -> Image.Image:
    """Return an image of any mode upright, as 8-bit grey or RGB.

    Sixteen bits are scaled from ``white`` to 255; transparency is laid over white; a palette is resolved. An image that
    is as wanted is returned itself.

    Args:
        image: As Pillow opens it.
        channels: 1 for grey (mode ``L``), 3 for ``RGB``.
        white: Value of 16-bit pixels that becomes 255; greater ones do too. 8-bit images are as they are.
        name: Its file, for messages.

    Raises:
        DamagedImageError: If the image holds what can't be shown by 8 bits, or has other channels than asked for.
    """
    if channels not in (1, 3) or isinstance(image, Bands):
        from .bands import as_bands

        return as_bands(image, channels, white, name)
    mode = "L" if channels == 1 else "RGB"
    try:
        # Before, TIFF's entry on its orientation is still there.
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray(to_bytes(_values_of(image, name), white))
        elif image.mode == "F":
            raise DamagedImageError(f"{name}: holds floating-point numbers of unknown range; save it with 8 or 16 bits")
        if "A" in image.mode.replace("LAB", "") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == mode else image.convert(mode)
    except TaskError:
        raise
    except Exception as error:
        raise DamagedImageError(f"{name}: can't be made {mode} from {image.mode} ({_reason(error)})") from error


def choose_white(files: Sequence[str | Path]) -> int:
    """Return the value of 16-bit pixels that is white for these images: the greatest of the depth that they have.

    Microscopes and X-ray detectors store 8, 10, 12 or 14 bits in 16. Of up to 100 of the files, evenly spread, those of
    16 bits are looked at; the least depth that holds all their values is theirs. Without any it is 65535.
    """
    indices = sorted({index * len(files) // LOOKED_AT for index in range(LOOKED_AT)}) if files else []
    greatest = -1
    for index in indices:
        try:
            greatest = max(greatest, _greatest_value(files[index]))
        except DamagedImageError:
            continue  # what can't be read is reported where it is needed
    return FULL_WHITE if greatest < 0 else white_of_depth(greatest)


def white_of_depth(greatest: int) -> int:
    """Return the greatest value of the least depth that holds ``greatest``."""
    return next(white for white in DEPTHS if white >= greatest)


def check_white(white: int | None) -> int | None:
    """Return ``data.white``, or raise a TaskError if it is no value of 16 bits."""
    if white is not None and not 1 <= white <= FULL_WHITE:
        raise TaskError(f"data.white is {white}, but must be from 1 to {FULL_WHITE}")
    return white


def _load(path: str | Path | BytesIO, deep_colours: bool, name: str | Path) -> tuple[Image.Image, np.ndarray | None]:
    """Return an image, and if asked for the values ``[H, W, C]`` of colours of 16 bits, of which Pillow takes 8."""
    if isinstance(path, str | Path) and (tiff := _only_ours(path)) is not None:
        raise DamagedImageError(f"{name}: has {tiff.channels} channels; data.channels={tiff.channels} reads them")
    with naming_damage(name), open_picture(path, name) as image:
        deep = deep_colours and _has_deep_colours(image)
        image.load()
        colours = _decode_colours(path) if deep else None
    return image, colours


def _has_deep_colours(image: Image.Image) -> bool:
    """Return whether an image that isn't decoded yet has colours of 16 bits."""
    return image.mode in ("LA", "RGB", "RGBA") and ";16" in str(image.tile)


def _decode_colours(path: str | Path | BytesIO) -> np.ndarray:
    """Return colours of 16 bits as they are stored, ``[H, W, 3 or 4]``."""
    import cv2

    content = np.fromfile(path, np.uint8) if isinstance(path, str | Path) else path.getbuffer()
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise ValueError("colours of 16 bits that can't be decoded")
    if values.shape[-1] == 4:
        # Red and blue change places where they are.
        values[..., 0], values[..., 2] = values[..., 2].copy(), values[..., 0].copy()
        return values
    return values[..., ::-1]


class DeepColours:
    """A picture with colours of 16 bits, which become bytes window by window.

    Attributes:
        size: Width and height as it is stored.
        orientation: As EXIF counts it.
    """

    def __init__(self, path: str | Path):
        with naming_damage(path):
            with open_picture(path) as picture:
                # An entry that follows the pixels is found by decoding them; of TIFF, both decoders turn the picture.
                exif = picture.getexif()
                if picture.format == "TIFF":
                    picture.load()
                self.orientation = exif.get(ExifTags.Base.Orientation, 1)
            del picture  # with its pixels, if they were decoded
            values = read_deep_png(path)
            self._values = _decode_colours(path) if values is None else values
        self.size = self._values.shape[1], self._values.shape[0]

    def crop(self, box: tuple[int, int, int, int], white: int) -> Image.Image:
        """Return a window as it is stored, RGB or RGBA; ``white`` as for `read_image`."""
        left, top, right, bottom = box
        return colours_as_image(self._values[top:bottom, left:right], white, self.orientation)


def colours_as_image(values: np.ndarray, white: int, orientation: int) -> Image.Image:
    """Return colours of 16 bits as a picture of bytes, whose alpha has a white of its own."""
    parts = to_bytes(values[..., :3], white), to_bytes(values[..., 3:], FULL_WHITE)
    image = Image.fromarray(np.concatenate(parts, axis=-1))
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return image


def deep_colours(path: str | Path) -> DeepColours | None:
    """Return a picture with colours of 16 bits; None of any other."""
    with naming_damage(path), open_picture(path) as picture:
        deep = _has_deep_colours(picture)
    return DeepColours(path) if deep else None


def _only_ours(path: str | Path):
    """Return a TIFF of more channels than Pillow has modes for; None of any other file."""
    from .tiff import Tiff, is_tiff

    tiff = Tiff(path) if is_tiff(path) else None
    return tiff if tiff is not None and tiff.channels > 4 else None


def _greatest_value(path: str | Path) -> int:
    """Return the greatest value of a 16-bit image, of the colours alone; -1 of one of 8 bits."""
    tiff = _only_ours(path)
    if tiff is not None:
        values = tiff.values(0, 0, tiff.width, tiff.height)
        return int(values.max()) if values.dtype == np.uint16 else -1
    try:
        with open_picture(path) as image:
            if not (image.mode.startswith("I") or _has_deep_colours(image)):
                return -1  # not decoded
    except Exception:
        return -1  # what can't be read is reported where it is needed
    image, colours = _load(path, deep_colours=True, name=path)
    return int((_values_of(image, path) if colours is None else colours[..., :3]).max())


def _values_of(image: Image.Image, name: str | Path) -> np.ndarray:
    """Return the values ``[H, W]`` of an image of integers, or raise a DamagedImageError if they need more bits."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > FULL_WHITE:
        raise DamagedImageError(f"{name}: holds 32-bit integers; save it with 8 or 16 bits")
    return values


def to_bytes(values: np.ndarray, white: int) -> np.ndarray:
    """Return integers of 0 to 65535 as uint8, ``white`` and what is greater as 255."""
    return ((np.minimum(values, white).astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
