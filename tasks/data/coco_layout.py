"""Where COCO's files and images lie in a folder: as distributed, or as CVAT, Label Studio and Roboflow export them."""

import json
import os
import re
from pathlib import Path

from .. import TaskError

# What splits are called in the names of files and folders.
SPLITS = {"train": ("train", "training", "default", "result"), "val": ("val", "valid", "validation", "test")}
_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
_PIECE = 1 << 20
_KEYS = ("images", "annotations", "categories")
# What the tools call their files of objects.
_NAMED = re.compile(r"^instances_|^result\.json$|_annotations\.coco\.json$")
_CUT = "is cut off, or no JSON in UTF-8"


def recognise(root: Path, kind: str = "instances") -> dict | None:
    """Return the settings of ``data`` by which a folder is read, if it holds files of COCO's formats; else None.

    Args:
        root: The folder.
        kind: ``"instances"`` or ``"panoptic"``.

    Raises:
        TaskError: If there are several files for a split, a file beside them is damaged, those to train on are missing,
            or none of the folders has the images that a file names.
    """
    there = [
        file
        for folder in (root, root / "annotations", *(root / name for names in SPLITS.values() for name in names))
        if folder.is_dir()
        for file in sorted(folder.glob("*.json"))
        if file.is_file()
    ]
    kinds = {file: kind_of(file) for file in there}
    for file in there if kind == "instances" else ():
        if kinds[file] is None and _NAMED.search(file.name):
            # Else a split, or the whole set, would be taken for something else.
            reason = f"has no {', '.join(_KEYS)}, the lists of COCO's files" if _is_whole(file) else _CUT
            raise TaskError(f"{file}: {reason}; write it again, or move it away")
    files = [file for file in there if kinds[file] == kind]
    # As distributed, other annotations lie beside the objects'.
    files = [file for file in files if kind in file.name] or files
    if not files:
        return None
    damaged = next((file for file in there if not _is_whole(file)), None)
    if damaged is not None:
        # Else a split would be taken for one that isn't there.
        raise TaskError(f"{damaged}: {_CUT}; write it again, or move it away")
    parts = {split: _of_split(files, split, root) for split in SPLITS}
    if parts["train"] is None:
        if len(files) == 1 and parts["val"] is not None:
            raise TaskError(
                f"{files[0]}: is named as held-out images, and there are none to train on; name it train to train on it"
            )
        if len(files) > 1:
            raise TaskError(
                f"{root}: which file is to train on, {', '.join(file.name for file in files)}? name it train"
            )
        parts["train"] = files[0]
    if parts["val"] == parts["train"]:
        parts["val"] = None
    return {split: file and _place(root, file, split) for split, file in parts.items()}


def kind_of(path: Path) -> str | None:
    """Return ``"instances"`` or ``"panoptic"`` of a file of COCO's formats, by its beginning and end; else None."""
    with open(path, "rb") as file:
        ends = file.read(_PIECE)
        file.seek(-min(_PIECE, path.stat().st_size), os.SEEK_END)
        ends += file.read()
    if not all(f'"{key}"'.encode() in ends for key in _KEYS):
        return None
    return "panoptic" if b'"segments_info"' in ends else None if b'"caption"' in ends else "instances"


def _is_whole(path: Path) -> bool:
    """Return whether a file begins and ends as JSON's lists and objects do."""
    with open(path, "rb") as file:
        start = file.read(_PIECE).lstrip()[:1]
        file.seek(-min(_PIECE, path.stat().st_size), os.SEEK_END)
        return start + file.read().rstrip()[-1:] in (b"{}", b"[]")


def _of_split(files: list[Path], split: str, root: Path) -> Path | None:
    """Return the file of a split, by its name or its folder's."""
    words = {file: {*re.split(r"[^a-z]+", f"{file.parent.relative_to(root)} {file.stem}".lower())} for file in files}
    for name in SPLITS[split]:
        named = [file for file in files if name in words[file]]
        if len(named) > 1:
            raise TaskError(
                f"{root}: has several files for {split}: {', '.join(file.name for file in named)}; keep one"
            )
        if named:
            return named[0]
    return None


def _place(root: Path, file: Path, split: str) -> dict[str, str]:
    """Return where a split's file is and in which folder its images are."""
    name = _first_name(file)
    suffix = file.stem.rpartition("_")[2]
    folders = [file.parent, *(root / each for each in dict.fromkeys((suffix, split, *SPLITS[split])))]
    folders += [root / "images" / folder.name for folder in folders[1:]] + [root / "images", root]
    last = (name or "").replace("\\", "/").rpartition("/")[2]
    for tried in dict.fromkeys((name, (name or "").replace("\\", "/"), last)):
        for folder in folders:
            if tried and os.path.isfile(folder / tried):
                return {key: os.path.relpath(path, root) for key, path in (("annotations", file), ("images", folder))}
    raise TaskError(
        f"{file}: names the image {name!r}, which is in none of {', '.join(map(str, dict.fromkeys(folders)))}"
    )


def _first_name(path: Path) -> str | None:
    """Return the first name of a file that a JSON file holds, without reading all of it."""
    rest = b""
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            rest += piece
            if (match := _NAME.search(rest)) is not None:
                try:
                    return json.loads(match[1], strict=False)
                except ValueError:
                    return match[1].decode(errors="replace")
            rest = rest[-1000:]
    return None
