"""Images whose pixels are labelled: by pictures of labels, by COCO's two formats, and the bundled nuclei."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .. import TaskError, check_sides
from ..dense.normalize import normalize
from ..dense.segment.inference import pad_to
from .annotations import Faults, count_values, in_threads
from .augment import IGNORE, Augment, resize_within
from .coco import (
    PanopticRecord,
    Record,
    decode_masks,
    encode_mask,
    mask_box,
    order_by_name,
    read_picture,
    read_segment_ids,
    to_run_lengths,
)
from .images import (
    FULL_WHITE,
    DamagedImageError,
    read_image,
    read_size,
    read_values,
    to_bytes,
    white_of_depth,
)
from .samples import load_nuclei_half


@dataclasses.dataclass(frozen=True)
class InputRule:
    """How an image becomes a segmenter's input; kept in every checkpoint.

    Attributes:
        short: It is resized, at the same ratio, to fit into ``short x long`` pixels, whichever way it lies; None: it
            keeps its size.
        long: See ``short``.
        divisor: Then both sides are stretched, a little, to the next multiple of it.
        mean: Subtracted from pixels of 0 to 1, for each channel.
        std: Divides the difference, for each channel.
        channel_order: ``"bgr"`` turns the channels round first; ``mean`` and ``std`` are in that order.
    """

    short: int | None
    long: int
    divisor: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: str = "rgb"

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != len(self.mean):
                raise TaskError("data.mean and data.std need a number each for every channel")
        for name in ("short", "long", "divisor"):
            check_sides(f"data.{name}", getattr(self, name))

    @property
    def channels(self) -> int:
        """How many channels images have."""
        return len(self.mean)

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """Return ``[C, H, W]``, float32, of pixels ``[H, W, C]``, uint8."""
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return normalize(image, self.mean, self.std, self.channel_order)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return an image as the input of evaluation, ``[C, H', W']``."""
        pixels = np.asarray(image)
        if self.short is not None:
            pixels = resize_within(pixels, self.short, self.long, self.divisor)
        return self.normalise(pixels)


class SegmentationSet(Dataset):
    """Labelled images, to train on or to be measured by; the sources of annotations are its subclasses.

    An item to train on is a normalised image ``[3, h, w]`` with labels ``[h, w]``, int64, of which ``IGNORE`` don't
    count, or for Mask2Former with a dict of ``labels`` ``[N]`` and ``masks`` ``[N, h, w]``, bool. One to be measured by
    is a dict of ``image`` and ``size``, with the truth in the image's own size.

    Attributes:
        white: As for `read_image`.

    Args:
        classes: Names of the classes, in the order of the labels.
        things: For each class whether its objects are told apart.
        rule: How images become inputs.
        output: What is predicted: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
        as_masks: Whether to train on masks.
        augment: Augmentation; the set is to be measured by if None.
        pad: Height and width to which smaller images are padded, by zeros after normalisation, to train on them.
        repeat: How often an epoch shows each image.
    """

    overlapping = False  # whether a pixel may be in several masks
    white = FULL_WHITE

    def __init__(
        self,
        classes: Sequence[str],
        things: Sequence[bool],
        rule: InputRule,
        output: str,
        as_masks: bool,
        augment: Augment | None = None,
        pad: tuple[int, int] | None = None,
        repeat: int = 1,
    ):
        self.classes, self.things = list(classes), list(things)
        self.rule, self.output, self.as_masks = rule, output, as_masks
        self.augment, self.pad, self.repeat = augment, pad, repeat

    @property
    def images(self) -> int:
        """Number of different images."""
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """Return an image as it is, RGB."""
        raise NotImplementedError

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return masks ``[N, H, W]``, uint8, their labels ``[N]``, and whether each is a crowd ``[N]``."""
        raise NotImplementedError

    def occurring(self) -> Iterator[np.ndarray]:
        """Yield the labels of every image's segments without crowds."""
        for index in range(self.images):
            _, labels, crowd = self.segments(index)
            yield labels[~crowd]

    def labels(self, index: int) -> np.ndarray:
        """Return the class of every pixel, ``[H, W]``, int32; ``IGNORE`` where there is none."""
        masks, labels, crowd = self.segments(index)
        image = self.image(index)
        painted = np.full((image.height, image.width), IGNORE, np.int32)
        for mask, label, is_crowd in zip(masks, labels, crowd, strict=True):
            if not is_crowd:
                painted[mask > 0] = label
        return painted

    def __len__(self) -> int:
        return self.images * self.repeat

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index %= self.images
        image = self.image(index)
        if self.augment is None:
            return {"image": self.rule(image), "size": (image.height, image.width)}, self._truth(index)
        pixels = np.asarray(image)
        if not self.as_masks:
            pixels, labels = self.augment(pixels, self.labels(index))
            return self._padded(self.rule.normalise(pixels), 0.0), self._padded(
                torch.from_numpy(labels.astype(np.int64)), IGNORE
            )
        masks, labels, crowd = self.segments(index)
        masks, labels = masks[~crowd], labels[~crowd]
        if self.overlapping:
            pixels, _, masks, left = self.augment.instances(pixels, _boxes(masks), masks)
        else:
            # One picture of all masks is augmented in place of each.
            numbers = np.einsum("nhw,n->hw", masks, np.arange(1, len(masks) + 1), dtype=np.uint16, casting="unsafe")
            pixels, numbers = self.augment(pixels, numbers, empty=0)
            left = np.unique(numbers[numbers > 0]).astype(np.int64) - 1
            masks = numbers == (left + 1)[:, None, None]
        image = self._padded(self.rule.normalise(pixels), 0.0)
        masks = self._padded(torch.from_numpy(np.ascontiguousarray(masks)).bool(), False)
        return image, {"labels": torch.from_numpy(labels[left]), "masks": masks}

    def _padded(self, x: Tensor, value: float) -> Tensor:
        return pad_to(x, [max(sides) for sides in zip(self.pad or (0, 0), x.shape[-2:], strict=True)], value)

    def _truth(self, index: int) -> Any:
        if self.output == "semantic":
            return torch.from_numpy(self.labels(index))
        masks, labels, crowd = self.segments(index)
        if self.output == "instance":
            return {
                "boxes": torch.from_numpy(_boxes(masks)),
                "labels": torch.from_numpy(labels),
                "area": torch.from_numpy(masks.sum((1, 2)).astype(np.float64)),
                "iscrowd": torch.from_numpy(crowd.astype(np.int64)),
                "size": tuple(masks.shape[1:]),
                "masks": [encode_mask(mask) for mask in masks],
            }
        # Class and number of every pixel's segment; void and crowds have the class after the last.
        truth = np.zeros((*masks.shape[1:], 2), np.int32)
        truth[..., 0] = len(self.classes)
        for number, (mask, label, is_crowd) in enumerate(zip(masks, labels, crowd, strict=True), start=1):
            if not is_crowd:
                truth[mask > 0] = label, number
        return torch.from_numpy(truth)

    def collate(self, items: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Return a batch: to train, one tensor of images, padded to the largest; to be measured by, lists."""
        inputs, targets = zip(*items, strict=True)
        if self.augment is None:
            return list(inputs), list(targets)
        size = [max(image.shape[side] for image in inputs) for side in (-2, -1)]
        images = torch.stack([pad_to(image, size) for image in inputs])
        if not self.as_masks:
            return images, torch.stack([pad_to(labels, size, IGNORE) for labels in targets])
        return images, [target | {"masks": pad_to(target["masks"], size, False)} for target in targets]


def _boxes(masks: np.ndarray) -> np.ndarray:
    return np.array([mask_box(mask) if mask.any() else (0.0,) * 4 for mask in masks], np.float64).reshape(-1, 4)


class LabelMaps(SegmentationSet):
    """Images with pictures whose values stand for classes.

    Args:
        files: ``(image, label map)`` of each.
        values: Class of each value of 0 to 255, int32 ``[256]``; -1 where there is none.
        skip_damaged: Whether images that can't be read are no fault in `check`.
        **settings: As for `SegmentationSet`.
    """

    def __init__(self, files: Sequence[tuple[Path, Path]], values: np.ndarray, skip_damaged: bool = False, **settings):
        super().__init__(**settings)
        self.files, self.values, self._skip_damaged = list(files), values, skip_damaged
        # How many pixels of each label map have each value, once they were checked.
        self.value_counts: list[dict[int, int]] = []

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(self.files)

    def keep(self, indices: Sequence[int]) -> None:
        """Leave out all images but these."""
        self.files, self.value_counts = (
            [every[index] for index in indices] for every in (self.files, self.value_counts)
        )

    @property
    def image_files(self) -> list[Path]:
        """Files of the images."""
        return [image for image, _ in self.files]

    def image(self, index: int) -> Image.Image:
        """Return an image as it is, RGB."""
        return read_image(self.files[index][0], self.rule.channels, self.white)

    def inventory(self) -> list[tuple[Path, str]]:
        """Return all images and label maps."""
        return [(file, "") for pair in self.files for file in pair]

    def labels(self, index: int) -> np.ndarray:
        """Return the class of every pixel, ``[H, W]``, int32; ``IGNORE`` where there is none."""
        return self.values[self._values(index).astype(np.uint8)]

    def _values(self, index: int) -> np.ndarray:
        """Return what a label map holds."""
        return read_values(self.files[index][1])

    def _size(self, index: int) -> tuple[tuple[int, int], bool]:
        """Return the height and width of an image, and whether EXIF turned it on its side for it."""
        return read_size(self.files[index][0])

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a mask for every class that is there."""
        labels = self.labels(index)
        present = np.setdiff1d(np.unique(labels), [IGNORE]).astype(np.int64)
        return (labels == present[:, None, None]).astype(np.uint8), present, np.zeros(len(present), bool)

    def occurring(self) -> Iterator[np.ndarray]:
        """Yield the labels in every label map that was checked."""
        for counts in self.value_counts:
            labels = self.values[list(counts)]
            yield labels[labels != IGNORE]

    def unlabelled(self) -> dict[int, float]:
        """Return the values that count as unlabelled, and their share of the pixels, of the label maps checked."""
        totals = np.zeros(256)
        for counts in self.value_counts:
            totals[list(counts)] += list(counts.values())
        shares = totals / max(totals.sum(), 1)
        return {int(value): float(shares[value]) for value in np.flatnonzero((self.values == IGNORE) & (totals > 0))}

    def _look_at(self, index: int) -> tuple[tuple[str, str] | None, dict[int, int]]:
        """Return the kind of a label map's fault and what is wrong, or None; and how many pixels have each value."""
        _, path = self.files[index]
        try:
            values = self._values(index)
        except DamagedImageError as error:
            return ("damaged", str(error)), {}
        if values.dtype.kind not in "biu":
            return ("damaged", f"{path}: holds numbers with fractions; a label map has 0 to 255"), {}
        counts = count_values(values)
        return self._find_fault(index, values.shape, counts), counts

    def _find_fault(self, index: int, shape: tuple[int, ...], counts: dict[int, int]) -> tuple[str, str] | None:
        image, path = self.files[index]
        unknown = [value for value in counts if not 0 <= value < 256 or self.values[value] < 0]
        if unknown:
            listed = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            return "value", f"{path.name} has values that stand for no class: {listed}"
        try:
            size, turned = self._size(index)
        except DamagedImageError as error:
            return None if self._skip_damaged else ("damaged", str(error))
        if shape == size:
            return None
        if turned and shape == size[::-1]:
            return "rotated", f"{image} is {size[0]}x{size[1]}, {path.name} {size[1]}x{size[0]}"
        return "size", f"{path.name} has {shape[0]}x{shape[1]} pixels, but its image {size[0]}x{size[1]}"

    def check(self, faults: Faults) -> None:
        """Read all label maps, note what is wrong, and leave out the images of which something is."""
        pairs, self.value_counts = [], []
        for pair, (fault, counts) in zip(self.files, in_threads(self._look_at, range(len(self.files))), strict=True):
            if fault is None:
                pairs.append(pair)
                self.value_counts.append(counts)
            else:
                faults.add(*fault)
        self.files = pairs


class CocoMaps(SegmentationSet):
    """Images with COCO's annotations, a record for each; what these are is for the subclasses."""

    def __init__(self, records: Sequence[PanopticRecord | Record], **settings):
        super().__init__(**settings)
        self.records = list(records)

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(self.records)

    def keep(self, indices: Sequence[int]) -> None:
        """Leave out all images but these."""
        self.records = [self.records[index] for index in indices]

    def order(self, classes: Sequence[str]) -> bool:
        """Number the classes as these are, if they are the same ones; return whether they are."""
        return order_by_name(self.records, self.classes, classes)

    @property
    def image_files(self) -> list[Path]:
        """Files of the images."""
        return [record.file for record in self.records]

    def image(self, index: int) -> Image.Image:
        """Return an image as it is, RGB."""
        return read_picture(self.records[index], self.white, self.rule.channels)

    def inventory(self) -> list[tuple[Path, list]]:
        """Return every image with its size and the labels of its objects or segments."""
        labels = (getattr(record, "instances", record).labels.tolist() for record in self.records)
        return [
            (record.file, [*record.size, *record_labels])
            for record, record_labels in zip(self.records, labels, strict=True)
        ]


class PanopticMaps(CocoMaps):
    """COCO's panoptic annotations."""

    def occurring(self) -> Iterator[np.ndarray]:
        """Yield the labels of every image's segments without crowds."""
        return (record.labels[~record.crowd] for record in self.records)

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the segments' masks, labels and whether they are crowds."""
        record = self.records[index]
        numbers = read_segment_ids(np.asarray(read_image(record.map)))
        return (numbers == record.ids[:, None, None]).astype(np.uint8), record.labels, record.crowd


class InstanceMaps(CocoMaps):
    """Annotations of instances, COCO's or YOLO's; semantic classes are theirs, and the background before them.

    Where objects overlap, a pixel is of the smallest: large ones lie behind.
    """

    def __init__(self, records: Sequence[Record], classes: Sequence[str], things: Sequence[bool], **settings):
        self.overlapping = settings["output"] != "semantic"
        if not self.overlapping:
            classes, things = ["background", *classes], [False, *things]
        super().__init__(records, classes=classes, things=things, **settings)

    def order(self, classes: Sequence[str]) -> bool:
        """Number the classes as these are, if they are the same ones, the background first; return whether they are."""
        if self.overlapping:
            return super().order(classes)
        return classes[0] == "background" and order_by_name(self.records, self.classes[1:], classes[1:])

    def occurring(self) -> Iterator[np.ndarray]:
        """Yield the labels of every image's objects without crowds."""
        for record in self.records:
            labels = record.instances.labels[~record.instances.crowd]
            yield labels if self.overlapping else np.concatenate([[0], labels + 1])

    def labels(self, index: int) -> np.ndarray:
        """Return the class of every pixel, ``[H, W]``, int32; ``IGNORE`` in crowds alone."""
        masks, labels, crowd = self.objects(index)
        painted = np.zeros(self.records[index].size, np.int32)
        for place in np.argsort(-masks.sum((1, 2), dtype=np.int64), kind="stable"):
            painted[masks[place] > 0] = IGNORE if crowd[place] else labels[place] + 1
        return painted

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the masks, labels and whether they are crowds of objects, or of classes and the background."""
        if self.overlapping:
            return self.objects(index)
        labels = self.labels(index)
        there = np.setdiff1d(labels, [IGNORE]).astype(np.int64)
        return (labels == there[:, None, None]).astype(np.uint8), there, np.zeros(len(there), bool)

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the objects' masks, labels and whether they are crowds."""
        record = self.records[index]
        instances = record.instances
        masks = [to_run_lengths(mask, *record.size) for mask in instances.masks]
        return decode_masks(masks, *record.size), instances.labels, instances.crowd


class Nuclei(SegmentationSet):
    """A half of the bundled micrograph: background is stuff, nuclei are things.

    For instances the only class is the nucleus; else there are background and nucleus.

    Args:
        split: ``"train"`` for the left half, else the right one.
        output: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
        tile: Side of the tiles that the half is cut into, row by row; None: one image.
        **settings: As for `SegmentationSet`.
    """

    def __init__(self, split: str, tile: int | None = None, output: str = "semantic", **settings):
        names = ["nucleus"] if output == "instance" else ["background", "nucleus"]
        super().__init__(classes=names, things=[name == "nucleus" for name in names], output=output, **settings)
        pixels, numbers = load_nuclei_half(split)
        self.white = white_of_depth(int(pixels.max()))
        height, width = numbers.shape
        down, across = (height, width) if tile is None else (tile, tile)
        if tile is not None and not 0 < tile <= width:
            raise TaskError(f"data.tile is {tile}, but must be from 1 to {width}")
        corners = [(y, x) for y in range(0, height, down) for x in range(0, width, across)]
        self.tiles = [tuple(half[y : y + down, x : x + across] for half in (pixels, numbers)) for y, x in corners]

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(self.tiles)

    def inventory(self) -> list:
        """Return nothing: the micrograph has no place of its own."""
        return []

    def image(self, index: int) -> Image.Image:
        """Return the half, or a tile of it, as RGB."""
        return Image.fromarray(to_bytes(self.tiles[index][0], self.white)).convert("RGB")

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return background, unless instances are asked for, and nuclei; for semantic masks all nuclei as one."""
        numbers = self.tiles[index][1]
        if self.output == "semantic":
            masks, labels = np.stack([numbers == 0, numbers > 0]), np.arange(2)
        else:
            ids = np.unique(numbers)
            ids = ids[ids > 0] if self.output == "instance" else ids
            masks = numbers == ids[:, None, None]
            labels = np.minimum(ids, 1) if self.output == "panoptic" else np.zeros_like(ids)
        return masks.astype(np.uint8), labels.astype(np.int64), np.zeros(len(labels), bool)
