"""Answers for pictures that are too large to be seen at once: found tile by tile, and merged.

The form is ours. Two tiles agree on an object or segment if what they saw of it in the part that both see overlaps by
half or more; what several tiles agree on is one. Each pixel's class is the tile's that sees most around it: neighbors
share their overlap in the middle.
"""

import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as rle_codec
from PIL import Image

from . import TaskError
from .checkpoints import write_whole
from .data.coco import decode_masks, encode_mask
from .data.windows import Windows, own_parts, starts
from .detections import keep_likely

_AGREEMENT = 0.5  # least overlap of what two tiles saw of one object
_CONTAINED = 0.8  # least share of a cut piece that lies in the object it is taken for a part of
_ROWS = 64  # of the classes of pixels that are read at once
OVERVIEW = 2048  # longest side of the picture of an answer


class Tile(NamedTuple):
    """What a tile sees, and which part of the picture is its own to decide: left, top, right, bottom of each."""

    seen: tuple[int, int, int, int]
    own: tuple[int, int, int, int]


class TiledAnswer(NamedTuple):
    """What was found in a picture.

    Attributes:
        answer: As the predictor would return it for the whole: a dict of objects, or a `TiledMap`.
        overview: The picture, made smaller.
        reduced: The answer for the overview.
    """

    answer: Any
    overview: Image.Image
    reduced: Any


def check_tiling(size: int, overlap: int | None, predictor: Any) -> int:
    """Return the overlap of tiles; an eighth of their side if None.

    Raises:
        TaskError: If there can't be such tiles, or the model names images as a whole.
    """
    if (predictor.card or {}).get("task") == "classify":
        raise TaskError("a classifier names the picture as a whole; tiles are for objects and classes of pixels")
    overlap = size // 8 if overlap is None else overlap
    if size < 32:
        raise TaskError(f"tiles of {size} pixels are too small; take 32 or more")
    if not 0 <= overlap <= size // 2:
        raise TaskError(f"tiles of {size} pixels overlap by 0 to {size // 2}, not {overlap}")
    return overlap


def lay_tiles(height: int, width: int, size: int, overlap: int) -> list[list[Tile]]:
    """Return the rows of tiles of a picture."""
    tops, lefts = starts(height, size, overlap), starts(width, size, overlap)
    rows, columns = own_parts(tops, size, height), own_parts(lefts, size, width)
    return [
        [
            Tile(
                (left, top, min(left + size, width), min(top + size, height)),
                (column[0], row[0], column[1], row[1]),
            )
            for left, column in zip(lefts, columns, strict=True)
        ]
        for top, row in zip(tops, rows, strict=True)
    ]


def predict_tiled(
    predictor: Any,
    windows: Windows,
    size: int,
    overlap: int,
    folder: str | Path | None = None,
    progress: Callable[[], Any] = lambda: None,
) -> TiledAnswer:
    """Return what a detector or segmenter finds in a picture, with a few tiles in memory.

    Args:
        predictor: Maps images to answers.
        windows: The picture.
        size: Side of a tile, in pixels.
        overlap: Pixels that neighbors share at least.
        folder: Where a file holds the classes of pixels meanwhile; the system's if None.
        progress: Called after each tile.
    """
    rows = lay_tiles(windows.height, windows.width, size, overlap)
    overview = _Overview(windows.width, windows.height)
    merged: _Objects | TiledMap | None = None
    tops = [row[0].seen[1] for row in rows[1:]] + [windows.height]
    for row, below in zip(rows, tops, strict=True):
        answers = []
        for tile in row:
            image = windows.read(*tile.seen)
            (answer,) = predictor([image])
            overview.add(image, tile)
            if merged is None:
                is_objects = isinstance(answer, Mapping)
                merged = (
                    _Objects(windows, predictor.threshold)
                    if is_objects
                    else TiledMap(windows, answer.ndim == 3, getattr(predictor, "things", ()), folder)
                )
            answers.append((tile, merged.take(answer)))
            progress()
        merged.add_row(answers, below)
    answer, reduced = merged.finish(overview)
    return TiledAnswer(answer, overview.image, reduced)


class _Overview:
    """A picture made smaller, tile by tile, by a whole number."""

    def __init__(self, width: int, height: int):
        self.step = max(1, -(-max(width, height) // OVERVIEW))
        self.image = Image.new("RGB", (max(1, width // self.step), max(1, height // self.step)))

    def add(self, image: Image.Image, tile: Tile) -> None:
        (left, top, _, _), own, step = tile.seen, tile.own, self.step
        x1, y1, x2, y2 = (side // step for side in own)
        x2, y2 = min(x2, self.image.width), min(y2, self.image.height)
        if x1 < x2 and y1 < y2:
            # A part of a cell may belong to the next tile, which this one sees too, or not: then it is left out.
            box = (x1 * step - left, y1 * step - top, x2 * step - left, y2 * step - top)
            box = (max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height))
            self.image.paste(image.convert("RGB").resize((x2 - x1, y2 - y1), Image.Resampling.BOX, box), (x1, y1))

    def centres(self, low: int, high: int, length: int) -> np.ndarray:
        """Return which of ``length`` pixels stand for the pixels ``low`` to ``high`` of the overview."""
        return np.minimum(np.arange(low, high) * self.step + self.step // 2, length - 1)


class _Groups:
    """Which of many numbered things are one."""

    def __init__(self):
        self.parent: list[int] = []

    def add(self, count: int) -> int:
        """Add things, and return the number of the first."""
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return first

    def find(self, index: int) -> int:
        while self.parent[index] != index:
            self.parent[index] = self.parent[self.parent[index]]
            index = self.parent[index]
        return index

    def join(self, one: int, other: int) -> None:
        one, other = sorted((self.find(one), self.find(other)))
        self.parent[other] = one


def _shared(one: Tile, other: Tile) -> tuple[int, int, int, int] | None:
    """Return what both tiles see, or None."""
    box = (*np.maximum(one.seen[:2], other.seen[:2]), *np.minimum(one.seen[2:], other.seen[2:]))
    left, top, right, bottom = (int(side) for side in box)
    return (left, top, right, bottom) if left < right and top < bottom else None


class _Objects:
    """Objects of all tiles, of which those that tiles agree on become one."""

    def __init__(self, windows: Windows, threshold: float):
        self._height, self._width, self._threshold = windows.height, windows.width, threshold
        self._groups, self._last = _Groups(), []
        self._boxes: list[np.ndarray] = []
        self._labels: list[int] = []
        self._scores: list[float] = []
        self._runs: list[np.ndarray] | None = []

    def take(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is kept of a tile's answer until its row is complete."""
        return answer

    def add_row(self, answers: list[tuple[Tile, Mapping[str, Any]]], below: int) -> None:
        here = []
        for tile, answer in answers:
            likely = keep_likely(answer, self._threshold)
            boxes = likely["boxes"].numpy().astype(np.float64) + np.tile(tile.seen[:2], 2)
            first = self._groups.add(len(boxes))
            self._boxes.extend(boxes)
            self._labels.extend(likely["labels"].tolist())
            self._scores.extend(likely["scores"].tolist())
            masks = likely.get("masks")
            if masks is None:
                self._runs = None
            elif self._runs is not None:
                self._runs.extend(_runs_of(mask, tile.seen, self._height) for mask in masks)
            here.append((tile, range(first, first + len(boxes)), masks))
        for place, one in enumerate(here):
            for other in [*here[place + 1 : place + 2], *self._last[max(place - 1, 0) : place + 2]]:
                shared = _shared(one[0], other[0])
                if shared is not None:
                    self._match(one, other, shared)
        self._last = here

    def _match(self, one: tuple, other: tuple, shared: tuple[int, int, int, int]) -> None:
        """Join what two tiles agree on in the part that both see."""
        pairs = []
        masks: dict[int, np.ndarray] = {}
        for first in self._within(one, shared):
            for second in self._within(other, shared):
                if self._labels[first] == self._labels[second]:
                    overlap, areas = self._overlap(one, first, other, second, shared, masks)
                    if overlap:
                        pairs.append((overlap / (sum(areas) - overlap), first, second, overlap, areas))
        taken: set[int] = set()
        pairs.sort(key=lambda pair: -pair[0])
        for agreement, first, second, *_ in pairs:
            if agreement >= _AGREEMENT and not {first, second} & taken:
                self._groups.join(first, second)
                taken |= {first, second}
        for _, first, second, overlap, areas in pairs:
            # What is left are pieces that a border cut off, of objects that the other tile sees better.
            for piece, tile, area in ((first, one[0], areas[0]), (second, other[0], areas[1])):
                if piece not in taken and overlap >= _CONTAINED * area and self._is_cut(self._boxes[piece], tile):
                    self._groups.join(first, second)
                    taken.add(piece)

    def _within(self, of_tile: tuple, shared: tuple[int, int, int, int]) -> list[int]:
        return [index for index in of_tile[1] if _area(_crop(self._boxes[index], shared)) > 0]

    def _overlap(
        self,
        one: tuple,
        first: int,
        other: tuple,
        second: int,
        shared: tuple[int, int, int, int],
        decoded: dict[int, np.ndarray],
    ) -> tuple[float, tuple[float, float]]:
        """Return how much two objects overlap in a part, and how large each is there; of masks where there are any."""
        crops = _crop(self._boxes[first], shared), _crop(self._boxes[second], shared)
        overlap = _area(_crop(crops[0], crops[1]))
        if self._runs is None or overlap <= 0:
            return max(overlap, 0.0), (_area(crops[0]), _area(crops[1]))
        for (tile, indices, masks), index in ((one, first), (other, second)):
            if index not in decoded:
                left, top, right, bottom = tile.seen
                mask = decode_masks([masks[index - indices.start]], bottom - top, right - left)[0]
                decoded[index] = mask[shared[1] - top : shared[3] - top, shared[0] - left : shared[2] - left] > 0
        overlap = np.count_nonzero(decoded[first] & decoded[second])
        return overlap, (np.count_nonzero(decoded[first]), np.count_nonzero(decoded[second]))

    def _is_cut(self, box: np.ndarray, tile: Tile) -> bool:
        """Return whether a box reaches a border of its tile that isn't one of the picture."""
        edges = (0, 0, self._width, self._height)
        return any(
            abs(side - border) <= 2 and border != edge for side, border, edge in zip(box, tile.seen, edges, strict=True)
        )

    def finish(self, overview: _Overview) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the objects, the likeliest first, of the picture and of its overview."""
        members: dict[int, list[int]] = {}
        for index in range(len(self._boxes)):
            members.setdefault(self._groups.find(index), []).append(index)
        best = {root: max(self._scores[index] for index in group) for root, group in members.items()}
        order = sorted(members, key=lambda root: -best[root])
        boxes = np.zeros((len(order), 4), np.float32)
        for place, root in enumerate(order):
            group = np.array([self._boxes[index] for index in members[root]])
            boxes[place] = *group[:, :2].min(0), *group[:, 2:].max(0)
        whole = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.tensor([self._labels[root] for root in order], dtype=torch.int64),
            "scores": torch.tensor([best[root] for root in order], dtype=torch.float32),
        }
        reduced = dict(whole) | {"boxes": whole["boxes"] / overview.step}
        if self._runs is not None:
            runs = [_join_runs([self._runs[index] for index in members[root]]) for root in order]
            whole["masks"] = [_encode_runs(run, self._height, self._width) for run in runs]
            reduced["masks"] = [
                _reduce_runs(run, box, self._height, self._width, overview)
                for run, box in zip(runs, boxes, strict=True)
            ]
        return whole, reduced


def _crop(box: Any, to: Any) -> np.ndarray:
    return np.concatenate([np.maximum(box[:2], to[:2]), np.minimum(box[2:], to[2:])])


def _area(box: np.ndarray) -> float:
    return float(max(box[2] - box[0], 0) * max(box[3] - box[1], 0))


def _runs_of(mask: dict, seen: tuple[int, int, int, int], height: int) -> np.ndarray:
    """Return where runs of a tile's mask begin and end ``[R, 2]`` in the picture, counted down its columns."""
    left, top, right, bottom = seen
    pixels = decode_masks([mask], bottom - top, right - left)[0].T.astype(np.int8)
    steps = np.diff(np.pad(pixels, ((0, 0), (1, 1))), axis=1)
    ends = []
    for step in (1, -1):
        columns, rows = np.nonzero(steps == step)
        ends.append((columns.astype(np.int64) + left) * height + rows + top)
    return np.stack(ends, 1)


def _join_runs(runs: list[np.ndarray]) -> np.ndarray:
    """Return the runs of what any mask covers, in order, none touching the next."""
    every = np.concatenate(runs)
    every = every[np.argsort(every[:, 0], kind="stable")]
    if not len(every):
        return every
    reach = np.maximum.accumulate(every[:, 1])
    new = np.concatenate([[True], every[1:, 0] > reach[:-1]])
    last = np.concatenate([np.flatnonzero(new)[1:] - 1, [len(every) - 1]])
    return np.stack([every[new, 0], reach[last]], 1)


def _encode_runs(runs: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Return COCO's run lengths of runs, without a picture of the mask."""
    ends = np.concatenate([[0], runs.ravel(), [height * width]])
    return rle_codec.frPyObjects({"size": [height, width], "counts": np.diff(ends).tolist()}, height, width)


def _reduce_runs(runs: np.ndarray, box: np.ndarray, height: int, width: int, overview: _Overview) -> dict[str, Any]:
    """Return the mask's run lengths in the overview, a pixel of which stands for one in the middle of its cell."""
    mask = np.zeros((overview.image.height, overview.image.width), np.uint8)
    left, top = (int(side // overview.step) for side in box[:2])
    right, bottom = (int(side // overview.step) + 1 for side in box[2:])
    right, bottom = min(right, mask.shape[1]), min(bottom, mask.shape[0])
    if len(runs) and left < right and top < bottom:
        x, y = overview.centres(left, right, width), overview.centres(top, bottom, height)
        places = x[None] * height + y[:, None]
        before = np.searchsorted(runs[:, 0], places, side="right") - 1
        mask[top:bottom, left:right] = (before >= 0) & (places < runs[before, 1])
    return encode_mask(mask)


class TiledMap:
    """Classes of pixels, or segments, which lie in a file meanwhile.

    Attributes:
        height: Of the picture.
        width: Of the picture.
        areas: Pixels of each ``(class, number)``; the number is 0 where there are no segments.

    Args:
        windows: The picture.
        has_segments: Whether pixels have the number of a segment.
        things: For each class whether its segments are told apart.
        folder: Where the file is.
    """

    def __init__(self, windows: Windows, has_segments: bool, things: Any, folder: str | Path | None):
        self.height, self.width, self.has_segments, self._things = windows.height, windows.width, has_segments, things
        self.areas: dict[tuple[int, int], int] = {}
        self._spool: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._dtype = np.dtype(np.int32 if has_segments else np.uint8)
        self._groups, self._last = _Groups(), []
        self._labels: list[int] = []
        self._bands: list[int] = []
        self._stuff: dict[int, int] = {}

    def take(self, answer: torch.Tensor) -> np.ndarray:
        """Return what is kept of a tile's answer until its row is complete: a number for each pixel."""
        return self._number(answer.numpy()) if self.has_segments else answer.numpy().astype(self._dtype)

    def add_row(self, here: list[tuple[Tile, np.ndarray]], below: int) -> None:
        top, bottom = here[0][0].own[1], here[0][0].own[3]
        band = np.zeros((bottom - top, self.width), self._dtype)
        for tile, numbers in here:
            (left, above, _, _), (x1, y1, x2, y2) = tile.seen, tile.own
            band[:, x1:x2] = numbers[y1 - above : y2 - above, x1 - left : x2 - left]
        if self.has_segments:
            for one, other in [*pairwise(here), *((one, other) for one in here for other in self._last)]:
                shared = _shared(one[0], other[0])
                if shared is not None:
                    self._match(one, other, shared)
            self._last = [_lower_end(tile, numbers, below) for tile, numbers in here]
        self._write(band)

    def _write(self, band: np.ndarray) -> None:
        try:
            self._spool.write(band.data)
        except OSError as error:
            raise TaskError(
                f"the classes of {self.height}x{self.width} pixels don't fit on the disk ({error})"
            ) from error
        self._bands.append(len(band))

    def _number(self, answer: np.ndarray) -> np.ndarray:
        """Return the pixels' segments by numbers that no other tile uses."""
        # One number for both sorts many times as fast.
        codes, inverse = np.unique((answer[..., 0].astype(np.int64) << 32) + answer[..., 1], return_inverse=True)
        first = self._groups.add(len(codes))
        for place, label in enumerate((codes >> 32).tolist()):
            self._labels.append(label)
            if label >= len(self._things) or not self._things[label]:
                self._groups.join(self._stuff.setdefault(label, first + place), first + place)
        return (inverse.reshape(answer.shape[:2]) + first).astype(np.int32)

    def _match(self, one: tuple, other: tuple, shared: tuple[int, int, int, int]) -> None:
        parts = []
        for tile, numbers in (one, other):
            left, top = tile.seen[:2]
            parts.append(numbers[shared[1] - top : shared[3] - top, shared[0] - left : shared[2] - left].ravel())
        codes, overlaps = np.unique((parts[0].astype(np.int64) << 32) + parts[1], return_counts=True)
        pairs = np.stack([codes >> 32, codes & 0xFFFFFFFF], 1)
        areas = [dict(zip(*(part.tolist() for part in np.unique(p, return_counts=True)), strict=True)) for p in parts]
        for (first, second), overlap in zip(pairs.tolist(), overlaps.tolist(), strict=True):
            union = areas[0][first] + areas[1][second] - overlap
            # Segments don't overlap, so that only one pair of each can agree.
            if self._labels[first] == self._labels[second] and overlap >= _AGREEMENT * union:
                self._groups.join(first, second)

    def finish(self, overview: _Overview) -> tuple["TiledMap", torch.Tensor]:
        """Return itself, and the classes of the overview's pixels, or classes and numbers, as predictors answer."""
        self._code_of = self._codes()
        rows = overview.centres(0, overview.image.height, self.height)
        columns = overview.centres(0, overview.image.width, self.width)
        reduced, top = [], 0
        counts = np.zeros(len(self._code_of), np.int64)
        for band in self._stored():
            for row in band:  # counting makes 8 bytes of each
                counts += np.bincount(row, minlength=len(counts))
            inside = rows[(rows >= top) & (rows < top + len(band))] - top
            reduced.append(self._as_answer(band[inside][:, columns]))
            top += len(band)
        for code, count in zip(self._code_of.tolist(), counts.tolist(), strict=True):
            if count:
                label, number = code
                self.areas[label, number] = self.areas.get((label, number), 0) + count
        return self, torch.from_numpy(np.concatenate(reduced))

    def _as_answer(self, band: np.ndarray) -> np.ndarray:
        return self._code_of[band] if self.has_segments else band

    def _codes(self) -> np.ndarray:
        """Return class and number for each value that is stored ``[N, 2]``; numbers count from 1 in their order."""
        if not self.has_segments:
            return np.stack([np.arange(256), np.zeros(256)], 1).astype(np.int32)
        number_of: dict[int, int] = {}
        roots = [self._groups.find(index) for index in range(len(self._labels))]
        numbers = [number_of.setdefault(root, len(number_of) + 1) for root in roots]
        return np.stack([self._labels, numbers], 1).astype(np.int32)

    def _stored(self) -> Iterator[np.ndarray]:
        self._spool.seek(0)
        rest = sum(self._bands)
        while rest:
            height = min(rest, _ROWS)
            content = self._spool.read(height * self.width * self._dtype.itemsize)
            yield np.frombuffer(content, self._dtype).reshape(height, self.width)
            rest -= height

    def bands(self) -> Iterator[np.ndarray]:
        """Yield the classes ``[h, W]``, or classes and numbers ``[h, W, 2]``, of band after band of the picture."""
        for band in self._stored():
            yield self._as_answer(band)

    def to_tensor(self) -> torch.Tensor:
        """Return what a predictor would for the whole."""
        return torch.from_numpy(np.concatenate(list(self.bands())))


def _lower_end(tile: Tile, numbers: np.ndarray, top: int) -> tuple[Tile, np.ndarray]:
    """Return a tile as if it saw from ``top`` on alone: what the next row, which begins there, shares with it."""
    return Tile((tile.seen[0], top, *tile.seen[2:]), tile.own), numbers[top - tile.seen[1] :].copy()


def write_png(path: str | Path, bands: Iterator[np.ndarray], height: int, width: int) -> None:
    """Write a PNG of any size band by band.

    Args:
        path: File.
        bands: Grey ``[h, W]`` or RGB ``[h, W, 3]``, uint8.
        height: Of all bands.
        width: Of each.
    """

    def write(partial: str | Path) -> None:
        with open(partial, "wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            packer, head = zlib.compressobj(3), True
            for band in bands:
                if head:
                    kind = 0 if band.ndim == 2 else 2
                    _chunk(file, b"IHDR", np.array([width, height], ">u4").tobytes() + bytes([8, kind, 0, 0, 0]))
                    head = False
                # Each row begins with its filter, which is none.
                rows = np.pad(band.reshape(len(band), -1), ((0, 0), (1, 0)))
                _chunk(file, b"IDAT", packer.compress(rows.tobytes()))
            _chunk(file, b"IDAT", packer.flush())
            _chunk(file, b"IEND", b"")

    write_whole(path, write)


def _chunk(file: BinaryIO, kind: bytes, content: bytes) -> None:
    file.write(len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big"))
