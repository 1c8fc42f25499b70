"""Images with annotated objects, and the bundled nuclei."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augment
from .coco import (
    Instances,
    Record,
    decode_masks,
    encode_mask,
    mask_box,
    read_picture,
    to_run_lengths,
)
from .images import FULL_WHITE, DamagedImageError, to_bytes, white_of_depth
from .mixing import Scene, copy_paste, mosaic
from .samples import load_nuclei_half


class DetectionSet(Dataset):
    """Images with their objects, to train on or to be measured by.

    An item is an image ``[C, H, W]``, uint8, and a target. To train: ``boxes`` ``[N, 4]`` in pixels, float32,
    ``labels`` ``[N]`` from 0, and ``masks`` ``[N, H, W]``, uint8, where there are masks; crowds are left out. To be
    measured: ``boxes`` in float64, ``labels``, ``iscrowd``, ``area``, ``size`` and ``masks`` as run lengths.

    Attributes:
        white: As for `read_image`.
        channels: As there.
        mosaic: How likely a training image is one of four; see `mosaic`.
        copy_paste: How likely it gets objects of another, which need masks; see `copy_paste`.

    Args:
        records: The images.
        classes: Names of the classes, in the order of the labels.
        augment: Augmentation; the set is to be measured by if None.
        repeat: How often an epoch shows each image.
    """

    white = FULL_WHITE
    channels = 3
    mosaic = copy_paste = 0.0

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
        """Return an image as it is, RGB or of other channels."""
        return read_picture(self.records[index % len(self.records)], self.white, self.channels)

    def inventory(self) -> list[tuple[Path, list]]:
        """Return every file with its size and the labels of its objects."""
        return [(record.file, [*record.size, *record.instances.labels.tolist()]) for record in self.records]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.records[index % len(self.records)]
        if self.augment is None:
            return _to_tensor(np.asarray(self.image(index))), _measured(record.instances, record.size)
        scene = self._augmented(self._with_mosaic(self._scene(index)))
        if self.copy_paste and torch.rand(()) < self.copy_paste and (others := self._others(1)):
            scene = copy_paste(scene, self._augmented(others[0]))
        target = {"boxes": torch.from_numpy(scene.boxes).float(), "labels": torch.from_numpy(scene.labels)}
        if scene.masks is not None:
            target["masks"] = torch.from_numpy(scene.masks)
        return _to_tensor(scene.pixels), target

    def _scene(self, index: int) -> Scene:
        """Return an image with its objects as they are in the data set, without crowds."""
        record = self.records[index % len(self.records)]
        instances = record.instances.select(~record.instances.crowd)
        masks = None if instances.masks is None else decode_masks(instances.masks, *record.size)
        return Scene(np.asarray(self.image(index)), instances.boxes, instances.labels, masks)

    def _augmented(self, scene: Scene) -> Scene:
        pixels, boxes, masks, left = self.augment.instances(scene.pixels, scene.boxes, scene.masks)
        return Scene(pixels, boxes, scene.labels[left], masks)

    def _with_mosaic(self, scene: Scene) -> Scene:
        if not self.mosaic or torch.rand(()) >= self.mosaic:
            return scene
        others = self._others(3)
        return mosaic([scene, *others]) if others else scene

    def _others(self, count: int) -> list[Scene]:
        """Return images of the set, drawn at random; none if one of them is damaged, which its own turn reports."""
        try:
            return [self._scene(index) for index in torch.randint(len(self.records), (count,)).tolist()]
        except DamagedImageError:
            return []

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
