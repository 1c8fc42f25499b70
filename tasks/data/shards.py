"""WebDataset's shards: tar files of images and their labels, ``000.jpg`` and ``000.cls`` (or ``.json``) for a sample.

The tars are indexed by their headers, once, so that any sample is read at its place: each process reads its own alone,
in the order that a seed gives, and a run goes on exactly where it stopped. The format:
https://github.com/webdataset/webdataset.
"""

import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...zoo.library_errors import first_line
from .. import TaskError
from .annotations import read_lines
from .images import EXTENSIONS, FULL_WHITE, is_hidden, read_image
from .labels import classes_of, is_number, number_of

LAYOUT = 'shards such as "train-{000..099}.tar"'
_HELD_OUT = ("val", "valid", "validation", "test")
_KEYS = ("label", "cls", "class")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_shards(pattern: str) -> list[Path]:
    """Return the files that a pattern names: ``{000..099}`` counts, ``{a,b}`` are both, and ``*`` matches.

    Raises:
        TaskError: If there is no such file.
    """
    names = [pattern]
    while any("{" in name and "}" in name for name in names):
        names = [each for name in names for each in _expanded(name)]
    files: dict[Path, None] = {}
    for name in names:
        here = sorted(map(Path, glob.glob(name))) if glob.has_magic(name) else [Path(name)]
        if not here or not all(file.is_file() for file in here):
            raise TaskError(f"{name}: no such shard; data.root and data.train name {LAYOUT}")
        files.update(dict.fromkeys(here))
    return list(files)


def _expanded(name: str) -> list[str]:
    """Return a name with the alternatives of its first braces."""
    before, _, rest = name.partition("{")
    inside, closed, after = rest.partition("}")
    counted = _RANGE.fullmatch(f"{{{inside}}}")
    if not closed:
        return [name]
    if counted is None:
        return [f"{before}{each}{after}" for each in inside.split(",")]
    low, high = counted.groups()
    return [f"{before}{number:0{len(low)}d}{after}" for number in range(int(low), int(high) + 1)]


class LabelledShards(Dataset):
    """Images with a label in the tars of a WebDataset.

    Attributes:
        classes: Names of the classes: lines of ``classes.txt`` beside the shards, by which labels count; or else all
            labels in order, numbers by their value.
        samples: ``(shard/key, index of its class)`` of every image.
        white: As for `read_image`.

    Args:
        shards: The tars.
        transform: Applied to the image.
        channels: As for `read_image`.
        classes: Fixes the order, and then any other label is an error.
        key: Of the label in ``.json``; the usual one if None.

    Raises:
        TaskError: If a shard is missing, damaged or compressed, or a sample lacks its image or its label; the message
            names both.
    """

    white = FULL_WHITE
    collate = None

    def __init__(
        self,
        shards: Sequence[Path],
        transform,
        channels: int,
        classes: Sequence[str] | None = None,
        key: str | None = None,
    ):
        self._places: dict[str, tuple[Path, int, int]] = {}
        labels: list[str] = []
        for shard in shards:
            for name, place, label in _read_shard(shard, key):
                if name in self._places:
                    raise TaskError(f"{name}: is in the shards twice")
                self._places[name] = place
                labels.append(label)
        if not labels:
            raise TaskError(f"{shards[0]}: holds no image; looked for {', '.join(EXTENSIONS)}")
        listing = shards[0].parent / "classes.txt"
        listed = listing.is_file()
        if classes is None:
            classes = [line for line in read_lines(listing) if line] if listed else classes_of(labels)
        self.classes = list(classes)
        indices = {name: index for index, name in enumerate(self.classes)}
        self.samples: list[tuple[str, int]] = []
        for name, label in zip(self._places, labels, strict=True):
            if listed and label not in indices and is_number(label) and 0 <= int(label) < len(self.classes):
                label = self.classes[int(label)]
            self.samples.append((name, number_of(label, indices, name)))
        self.targets = [label for _, label in self.samples]
        self.transform, self.channels = transform, channels

    @classmethod
    def of_root(
        cls,
        root: Path,
        place: Path,
        transform,
        channels: int,
        classes: Sequence[str] | None = None,
        layout: str = "",
        key: str | None = None,
    ) -> "LabelledShards":
        """Return the images of shards that a pattern below a root names."""
        return cls(expand_shards(str(place)), transform, channels, classes, key)

    def image(self, index: int) -> Image.Image:
        """Return an image as it is in its shard."""
        name = self.samples[index][0]
        shard, offset, size = self._places[name]
        with open(shard, "rb") as file:
            file.seek(offset)
            return read_image(io.BytesIO(file.read(size)), self.channels, self.white, name)

    def inventory(self) -> list[tuple[str, int]]:
        """Return every sample with its class."""
        return self.samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.image(index)), self.samples[index][1]


def _read_shard(shard: Path, key: str | None) -> Iterator[tuple[str, tuple[Path, int, int], str]]:
    """Yield of every sample its name, where its image is, and its label."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    end, length = 0, shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512 if member.isfile() else end
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                if member.isfile() and not any(map(is_hidden, member.name.removeprefix("./").split("/"))):
                    name = f"{folder}/{stem}".lstrip("./")
                    if samples.setdefault(name, {}).setdefault(ending.lower(), member) is not member:
                        raise TaskError(f"{shard}, {name}: has two files {file}; give one another name")
            # Tars end with zeros; one that is cut off between two files looks whole but for these.
            if end + 512 > length:
                raise tarfile.ReadError("it is cut off")
            # Where a header is broken the library stops, and says nothing.
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(512)):
                raise tarfile.ReadError(f"the header at byte {tar.offset} is broken")
            for name, parts in samples.items():
                yield _sample(tar, shard, name, parts, key)
    except TaskError:
        raise
    except (tarfile.TarError, OSError, EOFError) as error:
        raise TaskError(
            f"{shard}: no tar, compressed, or damaged ({first_line(error)}); shards are plain tars"
        ) from error


def _sample(
    tar: tarfile.TarFile, shard: Path, name: str, parts: dict[str, tarfile.TarInfo], key: str | None
) -> tuple[str, tuple[Path, int, int], str]:
    where = f"{shard}, {name}"
    images = [ending for ending in parts if f".{ending}" in EXTENSIONS]
    if not images:
        raise TaskError(f"{where}: has no image, but {', '.join(parts)}; known are {', '.join(EXTENSIONS)}")
    if len(images) > 1:
        raise TaskError(f"{where}: has several images, {', '.join(images)}; leave one")
    image = parts[images[0]]
    label: Any = None
    if "cls" in parts:
        try:
            label = tar.extractfile(parts["cls"]).read().decode().strip()
        except UnicodeDecodeError as error:
            raise TaskError(f"{where}: its .cls is not text in UTF-8") from error
    elif "json" in parts:
        try:
            content = json.loads(tar.extractfile(parts["json"]).read())
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where}: its .json can't be read ({first_line(error)})") from error
        content = content if isinstance(content, dict) else {}
        label = content.get(key) if key else next((content[each] for each in _KEYS if each in content), None)
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise TaskError(
            f"{where}: has no label; it is in .cls, or in .json under {key or ' or '.join(_KEYS)} (data.label_column)"
        )
    return f"{shard.name}/{name}", (shard, image.offset_data, image.size), str(label)


def recognise(root: Path) -> dict[str, Any] | None:
    """Return the settings of ``data`` by which a folder is read, if it holds shards to train on; else None."""
    for pattern in ("{}*.tar", "{}/*.tar"):
        if any(root.glob(pattern.format("train"))):
            held_out = (pattern.format(name) for name in _HELD_OUT if any(root.glob(pattern.format(name))))
            return {"train": pattern.format("train"), "val": next(held_out, None)}
    return None
