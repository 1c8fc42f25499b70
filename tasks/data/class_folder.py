"""Images in a folder for each class, laid out as ImageNet's."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from .. import TaskError, nearest
from .images import EXTENSIONS, FULL_WHITE, has_image_name, is_hidden, list_images, read_image

# Folders of other formats, which are no classes where there are no others.
_OTHERS = {"annotations", "images", "labels", "masks"}


class LabelledFolder(ImageFolder):
    """Images in one folder a class; ``classes`` fixes the order, and then any other folder is an error.

    What systems hide or add is left out, as `list_images` does it.

    Attributes:
        white: As for `read_image`.
    """

    white = FULL_WHITE
    collate = None

    def __init__(self, root: Path, transform, channels: int, classes: Sequence[str] | None = None):
        self._expected = classes
        self.channels = channels
        try:
            super().__init__(root, transform, loader=self._read)
        except FileNotFoundError as error:
            raise TaskError(f"{root}: {str(error).splitlines()[0]}") from error

    @classmethod
    def of_root(
        cls,
        root: Path,
        folder: Path,
        transform,
        channels: int,
        classes: Sequence[str] | None = None,
        layout: str = "",
    ) -> "LabelledFolder":
        """Return the images of a folder of a data set's root, which has the named layout."""
        if not folder.is_dir():
            raise TaskError(f"{folder}: no such folder; data.root needs {layout}")
        return cls(folder, transform, channels, classes)

    def _read(self, path: str) -> Image.Image:
        return read_image(path, self.channels, self.white)

    def image(self, index: int) -> Image.Image:
        """Return an image as it is in its file."""
        return self.loader(self.samples[index][0])

    def inventory(self) -> list[tuple[str, int]]:
        """Return every file with its class."""
        return self.samples

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class folders, in the expected order where there is one."""
        folders = sorted(
            entry.name for entry in Path(directory).iterdir() if entry.is_dir() and not is_hidden(entry.name)
        )
        if not folders:
            raise TaskError(f"{directory}: holds no folder; each class needs one, named after it, with its images")
        loose = sorted(entry.name for entry in Path(directory).iterdir() if entry.is_file() and has_image_name(entry))
        if loose:
            shown = ", ".join(loose[:3]) + (", ..." if len(loose) > 3 else "")
            warnings.warn(f"{directory}: left out, as in no class's folder: {shown} ({len(loose)})", stacklevel=2)
        for name in folders:
            if self._expected is not None and name not in self._expected:
                raise TaskError(
                    f"{directory}/{name}: no such class is in train/ or the model{nearest(name, self._expected)}"
                )
        classes = folders if self._expected is None else list(self._expected)
        # Only folders that exist: torchvision takes a class without images for an error.
        return classes, {name: index for index, name in enumerate(classes) if name in folders}

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], *args, **kwargs) -> list[tuple[str, int]]:
        """Return file and class of every image, folder by folder as torchvision orders them."""
        samples = []
        for name, index in sorted(class_to_idx.items()):
            images = list_images(Path(directory) / name)
            if not images:
                raise TaskError(f"{directory}/{name}: the class has no image; looked for {', '.join(EXTENSIONS)}")
            samples += [(file, index) for file in sorted(map(str, images), key=os.path.split)]
        return samples


def recognise(root: Path) -> dict | None:
    """Return the settings of ``data`` by which a folder is read, if it holds a folder of images a class; else None.

    Held-out images may be in ``val``, ``valid``, ``validation`` or ``test``; without ``train``, the root's own folders
    are the classes.
    """
    if not (root / "train").is_dir():
        return {"train": ".", "val": None} if _holds_classes(root) else None
    if not _holds_classes(root / "train"):
        return None
    val = next((name for name in ("val", "valid", "validation", "test") if _holds_classes(root / name)), None)
    return {"train": "train", "val": val}


def _holds_classes(folder: Path) -> bool:
    """Return whether all folders in one hold images themselves, and there are some.

    One without anything is a class whose images are missing, which is told as it is read.
    """
    if not folder.is_dir():
        return False
    folders = [entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name)]
    if {entry.name.lower() for entry in folders} <= _OTHERS:
        return False
    names = [[file.name for file in entry.iterdir() if not is_hidden(file.name)] for entry in folders]
    holds = [any(map(has_image_name, each)) for each in names]
    return any(holds) and all(there or not each for there, each in zip(holds, names, strict=True))
