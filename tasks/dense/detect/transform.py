"""Images as a detector sees them, and its answers as the images' owner sees them."""

import random
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ....kernels.lengths import padding_to
from ... import TaskError, check_sides
from ...extras import require
from ..normalize import check_images, check_order, normalize
from .boxes import has_area, scale_of


def resized_size(size: tuple[int, int], min_size: int, max_size: int) -> tuple[int, int]:
    """Return the ``(height, width)`` that an image of ``size`` gets: as large as both limits on its sides allow."""
    factor = min(max_size / max(size), min_size / min(size))
    height, width = (int(side * factor + 0.5) for side in size)
    return max(height, 1), max(width, 1)


class DetectorTransform(nn.Module):
    """Resizes, normalises, pads and batches images, as published detectors do it.

    Bytes are resized in fixed point by OpenCV, as in training of the published models; other images bilinearly. Padding
    follows normalisation, with zeros, on the right and at the bottom.

    Attributes:
        min_size: Length in pixels of the shorter side. Of several, training draws one and evaluation takes the last.
            None leaves images as they are.
        max_size: Most pixels of the longer side.
        mean: Mean of the channels, of images of 0 to 1.
        std: Their standard deviation.
        divisor: Sides of a batch are multiples of it.
        channel_order: ``"rgb"``, or ``"bgr"``: the model sees the channels the other way round, and ``mean`` and
            ``std`` are in its order.

    Raises:
        TaskError: If there is no such order, a length is out of range, or ``mean`` and ``std`` don't go together.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("min_size", "max_size", "mean", "std", "divisor", "channel_order")

    def __init__(
        self,
        min_size: int | Sequence[int] | None = 800,
        max_size: int = 1333,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        divisor: int = 32,
        channel_order: str = "rgb",
    ):
        super().__init__()
        check_order(channel_order)
        if len(mean) != len(std):
            raise TaskError(
                f"mean has {len(mean)} channels and std has {len(std)}; they must have as many as the images"
            )
        self.min_size = (min_size,) if isinstance(min_size, int) else None if min_size is None else tuple(min_size)
        check_sides("min_size", *(self.min_size or ()))
        check_sides("max_size", max_size)
        check_sides("divisor", divisor)
        self.max_size = max_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.divisor = divisor
        self.channel_order = channel_order

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        normalized: bool = False,
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None, list[tuple[int, int]]]:
        """Return the batch ``[B, C, H, W]``, its targets, and the ``(height, width)`` of each image in it.

        Args:
            images: Images ``[C, H, W]``, uint8, or floating point of 0 to 1.
            targets: ``boxes`` ``[M, 4]``, and optionally ``masks`` ``[M, H, W]``, of each image, in its pixels. Masks
                are resized by the nearest pixel and padded to the batch; objects of which no area is left go; all else
                is passed on.
            normalized: Whether the images are normalised already.

        Raises:
            TaskError: If an image has another shape, dtype, number of channels or values; of images on a GPU, values
                are looked at in evaluation alone.
        """
        for image in images:
            self._check_shape(image)
            check_images(image, len(self.mean), normalized, look=not self.training or image.device.type == "cpu")
        originals = [tuple(image.shape[-2:]) for image in images]
        sizes = [self._size(original) for original in originals]
        images = [resize(image, size) for image, size in zip(images, sizes, strict=True)]
        if not normalized:
            images = [normalize(image, self.mean, self.std, self.channel_order) for image in images]
        canvas = self.canvas(sizes)
        batch = torch.stack([_pad(image, canvas) for image in images])
        if targets is not None:
            targets = [
                _resize_target(target, original, size, canvas)
                for target, original, size in zip(targets, originals, sizes, strict=True)
            ]
        return batch, targets, sizes

    def padded_size(self, image: Tensor) -> tuple[int, int]:
        """Return the ``(height, width)`` of a batch of an image ``[C, H, W]`` alone, in evaluation.

        Raises:
            TaskError: If the image has another shape.
        """
        self._check_shape(image)
        return self.canvas([self._size(tuple(image.shape[-2:]))])

    def canvas(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return the ``(height, width)`` of a batch of images of such ``sizes``."""
        return tuple(-(-max(sides) // self.divisor) * self.divisor for sides in zip(*sizes, strict=True))

    def padded(self, batch: Tensor) -> Tensor:
        """Return images ``[B, C, H, W]``, normalised and of one size, padded as those of a batch are."""
        below, right = (padding_to(length, self.divisor) for length in batch.shape[-2:])
        return F.pad(batch, (0, right, 0, below))

    def _check_shape(self, image: Tensor) -> None:
        if image.dim() != 3 or len(image) != len(self.mean) or 0 in image.shape:
            raise TaskError(
                f"an image has shape {tuple(image.shape)}; the model takes [{len(self.mean)}, height, width]"
            )

    def _size(self, original: tuple[int, int]) -> tuple[int, int]:
        if self.min_size is None:
            return original
        return resized_size(
            original, random.choice(self.min_size) if self.training else self.min_size[-1], self.max_size
        )


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image ``[C, H, W]`` to ``(height, width)``: bytes in fixed point by OpenCV, others bilinearly."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if image.dtype != torch.uint8:
        return F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    cv2 = require("cv2")
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
    pixels = cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(pixels.reshape(*size, -1)).permute(2, 0, 1).to(image.device)


def _pad(x: Tensor, canvas: tuple[int, int]) -> Tensor:
    return F.pad(x, (0, canvas[1] - x.shape[-1], 0, canvas[0] - x.shape[-2]))


def _resize_target(
    target: dict[str, Tensor], original: tuple[int, int], size: tuple[int, int], canvas: tuple[int, int]
) -> dict[str, Tensor]:
    target = dict(target)
    target["boxes"] = target["boxes"].float() * scale_of(target["boxes"].float(), size, original)
    if "masks" in target:
        masks = target["masks"].to(torch.uint8)
        if original != size and len(masks):
            masks = F.interpolate(masks[:, None], size=size, mode="nearest")[:, 0]
        target["masks"] = _pad(masks if len(masks) else masks.new_zeros(0, *size), canvas)
    if original == size:
        return target
    left = has_area(target["boxes"], target.get("masks"))
    return {
        key: value[left] if key in ("boxes", "labels", "masks", "iscrowd", "area") else value
        for key, value in target.items()
    }
