"""Finding and reading images; the one reader that training, evaluation and prediction share."""

import glob
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import TaskError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class DamagedImageError(TaskError):
    """An image that is missing, or can't be read; the message names it."""


def find_images(sources: Iterable[str | Path]) -> list[Path]:
    """Expand files, folders (searched in depth) and globs into image files, in order and without repetition.

    Raises:
        TaskError: If a source doesn't exist or holds no image.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            here = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
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


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """Read an image of any mode upright, as 8-bit grey or RGB.

    Sixteen bits are scaled by their full range, 65535 to 255; transparency is laid over white; a palette is resolved.

    Args:
        path: Image file.
        channels: 1 for grey (mode ``L``), 3 for ``RGB``.

    Raises:
        DamagedImageError: If the file is missing, not an image or damaged.
        TaskError: If ``channels`` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise TaskError(f"{path}: images are read with 1 or 3 channels, but the model takes {channels}")
    try:
        with Image.open(path) as image:
            image.load()
            # In place, an upright image isn't copied.
            ImageOps.exif_transpose(image, in_place=True)
    except FileNotFoundError:
        raise DamagedImageError(f"{path}: no such file") from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedImageError(f"{path}: not an image, or damaged ({reason})") from error
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
