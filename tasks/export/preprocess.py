"""A classifier's preprocessing as part of its graph: resize as Pillow does it, crop, normalisation.

A resize is a product with a matrix for each axis whose rows are the filter at every output pixel; only the rows of the
crop are made, so that the sizes of the product don't depend on the image's. Pillow filters along the rows first, rounds
to whole grey levels, and then down the columns, and so does this.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .. import TaskError
from ..data.classification import InputRule

LAYOUTS = ("hwc", "chw")

# Pillow's weights are integers, in so many parts of 1, and its sums exact; ours are so in halves, which float32 holds.
_ONE, _HALF = 2.0**22, 2.0**11


def _triangle(distance: Tensor, reach: Tensor) -> Tensor:
    """Return Pillow's weights, whole numbers in float32, of pixels ``[size, L]`` at integer distances."""
    weights = (reach - distance.abs()).clamp(min=0)
    total = weights.sum(1, keepdim=True)
    return ((weights * int(2 * _ONE) + total) // (2 * total)).float()


def _cubic(distance: Tensor, reach: Tensor) -> Tensor:
    """Do so for Keys' cubic with a = -0.5, which is Pillow's; torch.nn.functional.interpolate's is -0.75."""
    x = distance.abs().float() / reach.float()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return (weights / weights.sum(1, keepdim=True) * _ONE).round()


_FILTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bilinear": _triangle, "bicubic": _cubic}


def _filtered(weights: Tensor, x: Tensor) -> Tensor:
    """Return the levels, rounded as Pillow does, that weights ``[size, L]`` make of ``[..., L, N]``."""
    high = (weights / _HALF).round()
    high, low = (torch.cat([high, weights - high * _HALF]) @ x).chunk(2, dim=-2)
    high = high + _HALF / 2
    level = (high / _HALF).floor()
    return (level + (((high - level * _HALF) * _HALF + low) / _ONE).floor()).clamp(0, 255)


class FromImages(nn.Module):
    """A classifier that takes an image as it is read from a file, of any height and width.

    Args:
        model: Maps normalised images ``[1, C, size, size]``.
        rule: How an image becomes its input.
        layout: ``"hwc"`` for ``[1, H, W, C]``, as decoders give it, or ``"chw"``.

    Shape:
        uint8 in ``layout`` to what the model returns. Its inputs are within one grey level of ``rule``'s, but for
        ``"squash"``: of images that shrink more in height than in width, Pillow 13 takes the columns first, which
        shows where the filter overshoots black or white.

    Raises:
        TaskError: If there is no such layout, or the rule's resize isn't one of those that can be written.
    """

    def __init__(self, model: nn.Module, rule: InputRule, layout: str = "hwc"):
        super().__init__()
        if layout not in LAYOUTS:
            raise TaskError(f"the layout of images is {layout!r}; it can be {' or '.join(LAYOUTS)}")
        if rule.interpolation not in _FILTERS:
            raise TaskError(
                f"--preprocess: {rule.interpolation} can't be written into the graph; {' and '.join(_FILTERS)} can; "
                "without --preprocess the metadata say how to resize"
            )
        if rule.crop_mode == "border":
            raise TaskError(
                "--preprocess: images that are fitted by their longer side (border) can't be written into the graph; "
                "without --preprocess the metadata say how to resize"
            )
        self.model, self.rule, self.layout = model, rule, layout
        self.size_axes = (1, 2) if layout == "hwc" else (2, 3)
        self.register_buffer("mean", torch.tensor(rule.mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(rule.std)[:, None, None] * 255, persistent=False)

    def example(self, height: int, width: int) -> Tensor:
        """Return a smooth image of a size, always the same."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(1, self.rule.channels, height // 8 + 2, width // 8 + 2, generator=generator)
        image = (nn.functional.interpolate(noise, size=(height, width), mode="bilinear") * 255).to(torch.uint8)
        return image.permute(0, 2, 3, 1).contiguous() if self.layout == "hwc" else image

    def check_inputs(self) -> Iterator[Tensor]:
        """Yield the images that the exported model is tried on: larger and smaller ones, upright and lying."""
        size = self.rule.size
        for height, width in ((size, size), (2 * size + 1, size + 7), (size // 2 + 1, size - 3)):
            yield self.example(height, width)

    def pixels(self, images: Tensor) -> Tensor:
        """Return the resized crop ``[1, C, size, size]`` in whole grey levels, float32."""
        x = (images.permute(0, 3, 1, 2) if self.layout == "hwc" else images).float()
        rows, columns = torch.arange(x.shape[2]), torch.arange(x.shape[3])
        height, width = rows[-1] + 1, columns[-1] + 1
        scaled = int(self.rule.size / self.rule.crop_pct)
        if self.rule.crop_mode == "squash":
            sides = [torch.full_like(height, scaled)] * 2
        else:
            # Of the longer side the whole pixels, as torchvision has it.
            short = torch.minimum(height, width)
            sides = [side * scaled // short for side in (height, width)]
        x = _filtered(self._weights(columns, width, sides[1]), x.mT).mT
        return _filtered(self._weights(rows, height, sides[0]), x)

    def _weights(self, positions: Tensor, length: Tensor, scaled: Tensor) -> Tensor:
        """Return the weights ``[size, L]`` of an axis's pixels in those of the crop of its ``scaled`` ones.

        Distances are integers: a position that is rounded to float32 is off by more than a level may bear.
        """
        first = ((scaled - self.rule.size) / 2).round().long()
        centre = (2 * (torch.arange(self.rule.size) + first) + 1) * length
        distance = (2 * positions + 1) * scaled - centre[:, None]
        return _FILTERS[self.rule.interpolation](distance, 2 * torch.maximum(length, scaled))

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's answer; see the class."""
        return self.model((self.pixels(images) - self.mean) / self.std)
