"""Images with annotated objects: COCO's JSON, Pascal VOC's XML, and the bundled nuclei."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .. import TaskError, nearest
from .augment import Augment
from .coco import (
    Instances,
    Record,
    decode_masks,
    encode_mask,
    mask_box,
    order_by_name,
    read_instances,
    read_picture,
    to_run_lengths,
)
from .images import FULL_WHITE, check_white, choose_white, to_bytes, white_of_depth
from .samples import load_nuclei_half
from .voc import name_classes, read_voc

DATA_SETS = ("coco", "nuclei", "voc")


class DetectionSet(Dataset):
    """Images with their objects, to train on or to be measured by.

    An item is an image ``[3, H, W]``, uint8, and a target. To train: ``boxes`` ``[N, 4]`` in pixels, float32,
    ``labels`` ``[N]`` from 0, and ``masks`` ``[N, H, W]``, uint8, where there are masks; crowds are left out. To be
    measured: ``boxes`` in float64, ``labels``, ``iscrowd``, ``area``, ``size`` and ``masks`` as run lengths.

    Attributes:
        white: As for `read_image`.

    Args:
        records: The images.
        classes: Names of the classes, in the order of the labels.
        augment: Augmentation; the set is to be measured by if None.
        repeat: How often an epoch shows each image.
    """

    white = FULL_WHITE

    def __init__(
        self, records: Sequence[Record], classes: Sequence[str], augment: Augment | None = None, repeat: int = 1
    ):
        self.records = list(records)
        self.classes = list(classes)
        self.augment = augment
        self.repeat = repeat

    def __len__(self) -> int:
        return len(self.records) * self.repeat

    def occurring(self) -> Iterator[np.ndarray]:
        """Yield the labels of every image's objects without crowds."""
        return (record.instances.labels[~record.instances.crowd] for record in self.records)

    def image(self, index: int) -> Image.Image:
        """Return an image as it is, RGB."""
        return read_picture(self.records[index % len(self.records)], self.white)

    def inventory(self) -> list[tuple[Path, list]]:
        """Return every file with its size and the labels of its objects."""
        return [(record.file, [*record.size, *record.instances.labels.tolist()]) for record in self.records]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.records[index % len(self.records)]
        instances, pixels = record.instances, np.asarray(self.image(index))
        if self.augment is None:
            return _to_tensor(pixels), _measured(instances, record.size)
        instances = instances.select(~instances.crowd)
        masks = None if instances.masks is None else decode_masks(instances.masks, *record.size)
        pixels, boxes, masks, left = self.augment.instances(pixels, instances.boxes, masks)
        target = {"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(instances.labels[left])}
        if masks is not None:
            target["masks"] = torch.from_numpy(masks)
        return _to_tensor(pixels), target

    @staticmethod
    def collate(items: list[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
        """Return images and targets as lists: their sizes differ."""
        images, targets = zip(*items, strict=True)
        return list(images), list(targets)


class Nuclei(DetectionSet):
    """The bundled micrograph: the left half, ``"train"``, or the right one, ``"val"``; 512x256 pixels each.

    A nucleus on the cut is in both, each time with the part that is there.
    """

    def __init__(self, split: str, augment: Augment | None = None, repeat: int = 1):
        pixels, labels = load_nuclei_half(split)
        self.pixels = pixels
        self.white = white_of_depth(int(pixels.max()))
        masks = [labels == number for number in np.unique(labels) if number]
        instances = Instances(
            np.array([mask_box(mask) for mask in masks]),
            np.zeros(len(masks), np.int64),
            np.array([mask.sum() for mask in masks], np.float64),
            np.zeros(len(masks), bool),
            [encode_mask(mask) for mask in masks],
        )
        record = Record(Path(f"nuclei-{split}.png"), labels.shape, split, instances)
        super().__init__([record], ["nucleus"], augment, repeat)

    def inventory(self) -> list:
        """Return nothing: the micrograph has no place of its own."""
        return []

    def image(self, index: int) -> Image.Image:
        """Return the half as RGB."""
        return Image.fromarray(to_bytes(self.pixels, self.white)).convert("RGB")


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _measured(instances: Instances, size: tuple[int, int]) -> dict[str, Any]:
    target = {
        "boxes": torch.from_numpy(instances.boxes),
        "labels": torch.from_numpy(instances.labels),
        "area": torch.from_numpy(instances.areas),
        "iscrowd": torch.from_numpy(instances.crowd.astype(np.int64)),
        "size": tuple(size),
    }
    if instances.masks is not None:
        target["masks"] = [to_run_lengths(mask, *size) for mask in instances.masks]
    return target


def build_datasets(data: dict, with_masks: bool, skip_damaged: bool = False) -> tuple[DetectionSet, DetectionSet]:
    """Return the training and the validation set that a config's ``data`` describes.

    Args:
        data: As in `Detect.DEFAULTS`.
        with_masks: Whether the objects need masks.
        skip_damaged: Whether images that can't be read are left to the loader, which skips them.

    Raises:
        TaskError: If the data set is unknown, its files are missing or its annotations broken, or training and
            validation have different classes.
    """
    augment = Augment(data["augment"])
    if data["broken"] not in ("refuse", "drop"):
        raise TaskError(f"data.broken is {data['broken']!r}, but must be refuse or drop")
    if data["repeat"] < 1:
        raise TaskError(f"data.repeat is {data['repeat']}, but must be at least 1")
    white = check_white(data.get("white"))
    if data["name"] == "nuclei":
        train, val = Nuclei("train", augment, data["repeat"]), Nuclei("val")
        if data["classes"] is not None and list(data["classes"]) != train.classes:
            raise TaskError(f"data.classes is {list(data['classes'])}, but nuclei has {train.classes}")
        train.white = val.white = white or train.white
    elif data["name"] in DATA_SETS:
        parts = {split: _read_part(data, split, with_masks, skip_damaged) for split in ("train", "val")}
        (records, classes), (held_out, found) = parts["train"], parts["val"]
        if not order_by_name(held_out, found, classes):
            differing = sorted(set(classes) ^ set(found)) or "names that repeat, in another order"
            raise TaskError(f"training and validation annotations have different classes: {differing}")
        if not data["keep_empty"]:
            records = [record for record in records if not record.instances.crowd.all()]
        train = DetectionSet(records, classes, augment, data["repeat"])
        val = DetectionSet(held_out, classes)
        train.white = val.white = white or choose_white([record.file for record in records])
    else:
        raise TaskError(f"unknown data set {data['name']!r}{nearest(str(data['name']), DATA_SETS)}")
    if data["num_classes"] not in (None, len(train.classes)):
        raise TaskError(
            f"data.num_classes is {data['num_classes']}, but {data['root'] or data['name']} has {len(train.classes)} "
            f"classes; leave it None to take what is there"
        )
    return train, val


def _read_part(data: dict, split: str, with_masks: bool, skip_damaged: bool) -> tuple[list[Record], list[str]]:
    if data["root"] is None:
        raise TaskError("data.root is not set; name the folder that holds images and annotations")
    root, part = Path(data["root"]).expanduser(), data[split]
    if not root.is_dir():
        raise TaskError(f"{root}: no such folder (data.root)")
    if data["name"] == "voc":
        classes = name_classes(data["classes"])
        return read_voc(root, part["split"], classes, with_masks, data["broken"], skip_damaged), classes
    images = root / part["images"]
    if not images.is_dir():
        raise TaskError(f"{images}: no such folder (data.root and data.{split}.images)")
    path = root / part["annotations"]
    records, found, _ = read_instances(path, images, with_masks, data["broken"], skip_damaged)
    classes = found if data["classes"] is None else list(data["classes"])
    if not order_by_name(records, found, classes):
        raise TaskError(f"data.classes is {classes}, but {path} has {found}")
    return records, classes
