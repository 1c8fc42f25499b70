"""How a classifier sees images, and the bundled digits."""

import dataclasses
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import CenterCropOrPad, ResizeKeepRatio, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomAffine, Resize

from .. import TaskError, check_sides, nearest
from .images import FULL_WHITE
from .samples import DIGITS_TRAIN, load_digits

SEVERAL = "|"  # between the labels of an image, where it may have several
# timm's augmentations that need colours, or Pillow's images.
_COLOURED = ("color_jitter", "auto_augment", "grayscale_prob", "gaussian_blur_prob")
CROP_MODES = ("center", "squash", "border")


@dataclasses.dataclass(frozen=True)
class InputRule:
    """How an image becomes the model's input; kept in every checkpoint, so that prediction does as training did.

    Attributes:
        size: Height and width, in pixels, of the square input.
        channels: 1 for grey, 3 for RGB; any other for images that have so many.
        mean: Subtracted from pixels of 0 to 1, for each channel.
        std: Divides the difference, for each channel.
        interpolation: Of the resize, such as ``"bicubic"``.
        crop_pct: Part of the resized image's side that the central crop keeps.
        crop_mode: How an image that isn't square is fitted, as timm names it: ``"center"`` resizes the shorter side,
            ``"squash"`` both, ``"border"`` the longer one.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != self.channels:
                raise TaskError(f"data.{name} needs one number for each of the {self.channels} channels")
        check_sides("data.size", self.size)
        if self.crop_mode not in CROP_MODES:
            raise TaskError(f"data.crop_mode is {self.crop_mode!r}{nearest(self.crop_mode, CROP_MODES)}")
        ways = [mode.value for mode in InterpolationMode]
        if self.interpolation not in ways:
            raise TaskError(f"data.interpolation is {self.interpolation!r}{nearest(self.interpolation, ways)}")

    def transform(self, augment: dict | None = None):
        """Return timm's transform from an image to ``[channels, size, size]``; ``augment`` makes it random.

        Args:
            augment: Arguments of timm's ``create_transform``, of which ``interpolation`` may be ``"random"``;
                ``affine``, those of torchvision's ``RandomAffine``, which then comes first, on the resized image; and
                ``transforms``, any of albumentations', which come before that. None for the transform of evaluation.
        """
        augment = None if augment is None else dict(augment)
        affine = (augment or {}).pop("affine", None)
        described = (augment or {}).pop("transforms", ())
        is_bands = self.channels not in (1, 3)
        if is_bands and augment is not None:
            # timm jitters colours unless it is told not to.
            augment = {"color_jitter": None} | augment
            if coloured := [key for key in _COLOURED if augment.get(key)]:
                raise TaskError(
                    f"data.augment.{coloured[0]} is for grey and colours, not for {self.channels} channels; set it to "
                    f"None: data.augment.{coloured[0]}=None"
                )
        transform = create_transform(
            input_size=(self.channels, self.size, self.size),
            is_training=augment is not None,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            **{"interpolation": self.interpolation, **(augment or {})},
        )
        keep_posterize_total(transform)
        before: list[Any] = []
        if described:
            from .augment import ImageTransforms

            before.append(ImageTransforms(described))
        if is_bands:
            before.append(_bands_to_tensor)
        if affine is not None:
            resize = Resize(self.size, InterpolationMode(self.interpolation))
            before += [resize, RandomAffine(interpolation=InterpolationMode.BILINEAR, **affine)]
        return Compose([*before, transform]) if before else transform

    def place(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return where the left, right, top and bottom edge of an image of ``(width, height)`` come, in input pixels.

        Edges that are cropped away lie beyond the input.
        """
        left, top, scale_x, scale_y = 0.0, 0.0, 1.0, 1.0
        picture = Image.new("L", size)
        for step in self.transform().transforms:
            if step is _bands_to_tensor:
                continue
            if not isinstance(step, (Resize, ResizeKeepRatio, CenterCrop, CenterCropOrPad)):
                break
            before, picture = picture.size, step(picture)
            if isinstance(step, (CenterCrop, CenterCropOrPad)):
                left, top = (
                    edge - (round((old - new) / 2) if old >= new else -((new - old) // 2))
                    for edge, old, new in zip((left, top), before, picture.size, strict=True)
                )
            else:
                x, y = (new / old for old, new in zip(before, picture.size, strict=True))
                left, top, scale_x, scale_y = left * x, top * y, scale_x * x, scale_y * y
        return left, left + size[0] * scale_x, top, top + size[1] * scale_y


def _bands_to_tensor(image: Any) -> Tensor:
    """Return an image's channels as Pillow's images become tensors, ``[C, H, W]`` of 0 to 1."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()).float() / 255


def keep_posterize_total(transform: Compose) -> None:
    """Let timm's augmentation posterize to no bits at all, a black image, as published training did.

    At the greatest magnitude, which noise on the magnitude reaches now and then, timm asks for 0 bits; Pillow now
    refuses that.
    """
    for step in transform.transforms:
        chains = [getattr(step, "ops", ()), *getattr(step, "policy", ())]
        for op in (op for chain in chains for op in chain if op.aug_fn is posterize):
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    return posterize(image, bits, **kwargs) if bits >= 1 else image.point(lambda value: 0)


class Digits(Dataset):
    """UCI's digits as dark ink on white, ``"train"`` (1400) or ``"val"`` (the other 397)."""

    classes = tuple("0123456789")
    white = FULL_WHITE
    collate = None

    def __init__(self, split: str, transform=None):
        images, labels = load_digits()
        part = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
        # Ink of 0..16 to brightness, as on paper.
        self.pixels = (255 - np.rint(images[part] * (255 / 16))).astype(np.uint8)
        self.targets = labels[part].tolist()
        self.transform = transform

    def image(self, index: int) -> Image.Image:
        """Return a digit as it is, 8x8 grey."""
        return Image.fromarray(self.pixels[index])

    def inventory(self) -> list:
        """Return nothing: the digits have no place of their own."""
        return []

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.image(index)), self.targets[index]
