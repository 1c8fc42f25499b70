"""Augmentation of images with boxes, masks and label maps: the published recipes' transforms, by albumentations.

Everything random is drawn from torch's generator, which the engine seeds for every epoch.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from .. import TaskError, check_sides, nearest
from ..dense.detect.boxes import has_area
from .images import Bands

# Otherwise it asks the network for a newer version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations
from albumentations.core.type_definitions import Targets

IGNORE = 255  # the label of pixels that belong to no class


def fit_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """Return the height and width, at the same ratio, that fit into ``short x long`` pixels, whichever way it lies.

    The rule of mmcv and detectron2: the factor is the smaller of both sides', and sizes are rounded half up; a line
    keeps one pixel.
    """
    factor = min(long / max(height, width), short / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def resize_within(image: np.ndarray, short: float, long: float, divisor: int = 1) -> np.ndarray:
    """Resize an image ``[H, W, C]``, uint8, to `fit_size`, as the published evaluations do: bilinear, not antialiased.

    Args:
        image: Pixels.
        short: See `fit_size`.
        long: See `fit_size`.
        divisor: Then resize again, a little, so that both sides become the next multiple of it.
    """
    size = fit_size(*image.shape[:2], short, long)
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    stretched = tuple(-(-side // divisor) * divisor for side in size)
    return image if stretched == size else cv2.resize(image, stretched[::-1], interpolation=cv2.INTER_LINEAR)


class ResizeWithin(albumentations.DualTransform):
    """Resize, at the same ratio, to fit into one of several sizes.

    Args:
        shorts: Lengths of the short side, one of which is drawn.
        long: Greatest length of the long side.
        ratio: Interval from which a factor of both is drawn, or None.
    """

    class InitSchema(albumentations.DualTransform.InitSchema):
        """Types of the arguments."""

        shorts: Sequence[int]
        long: int
        ratio: tuple[float, float] | None

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    def __init__(self, shorts: Sequence[int], long: int, ratio: tuple[float, float] | None = None, p: float = 1.0):
        super().__init__(p=p)
        self.shorts, self.long, self.ratio = shorts, long, ratio

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict[str, Any]:
        """Draw the size."""
        short = self.py_random.choice(list(self.shorts))
        factor = 1.0 if self.ratio is None else self.py_random.uniform(*self.ratio)
        # mmcv truncates the drawn scale to whole pixels.
        limits = (short, self.long) if self.ratio is None else (int(short * factor), int(self.long * factor))
        return {"size": fit_size(*params["shape"][:2], *limits)}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params) -> np.ndarray:
        """Resize an image ``[H, W, C]``."""
        return cv2.resize(img, size[::-1], interpolation=cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], **params) -> np.ndarray:
        """Resize a label map ``[H, W]``."""
        return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)

    def apply_to_bboxes(self, bboxes: np.ndarray, **params) -> np.ndarray:
        """Return boxes, which are in fractions of the image, as they are."""
        return bboxes


class RandomWindow(albumentations.DualTransform):
    """Cut a window at a random place; an image that is smaller stays whole in that direction.

    Args:
        low: Least height and width of the window.
        high: Greatest; the size itself if both are equal.
        max_share: For label maps: draw again, up to ten times, while one class has this share of the window or more.
    """

    class InitSchema(albumentations.DualTransform.InitSchema):
        """Types of the arguments."""

        low: tuple[int, int]
        high: tuple[int, int]
        max_share: float

    _targets = ResizeWithin._targets

    def __init__(self, low: tuple[int, int], high: tuple[int, int], max_share: float = 1.0, p: float = 1.0):
        super().__init__(p=p)
        self.low, self.high, self.max_share = low, high, max_share

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict[str, Any]:
        """Draw the window."""
        height, width = params["shape"][:2]
        window = [
            min(side, self.py_random.randint(min(low, side), min(high, side)))
            for side, low, high in zip((height, width), self.low, self.high, strict=True)
        ]
        for _ in range(10):
            top, left = (
                self.py_random.randint(0, side - size) for side, size in zip((height, width), window, strict=True)
            )
            crop = (top, left, top + window[0], left + window[1])
            if self.max_share >= 1 or "mask" not in data:
                break
            labels, counts = np.unique(data["mask"][crop[0] : crop[2], crop[1] : crop[3]], return_counts=True)
            counts = counts[labels != IGNORE]
            if len(counts) > 1 and counts.max() / counts.sum() < self.max_share:
                break
        return {"crop": crop}

    def apply(self, img: np.ndarray, crop: tuple[int, int, int, int], **params) -> np.ndarray:
        """Cut an image or label map ``[H, W, ...]``."""
        top, left, bottom, right = crop
        return np.ascontiguousarray(img[top:bottom, left:right])

    def apply_to_bboxes(self, bboxes: np.ndarray, crop: tuple[int, int, int, int], **params) -> np.ndarray:
        """Shift boxes; albumentations clips them."""
        (height, width), (top, left, bottom, right) = params["shape"][:2], crop
        shifted = bboxes.copy()
        shifted[:, [0, 2]] = (bboxes[:, [0, 2]] * width - left) / (right - left)
        shifted[:, [1, 3]] = (bboxes[:, [1, 3]] * height - top) / (bottom - top)
        return shifted


class PhotometricDistortion(albumentations.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue as SSD's authors distorted them (arXiv 1512.02325), as in mmseg.

    Args:
        brightness: Greatest value that is added or subtracted.
        contrast: Interval of the factor.
        saturation: Interval of the factor.
        hue: Greatest shift, in units of two degrees.
    """

    class InitSchema(albumentations.ImageOnlyTransform.InitSchema):
        """Types of the arguments."""

        brightness: int
        contrast: tuple[float, float]
        saturation: tuple[float, float]
        hue: int

    def __init__(
        self,
        brightness: int = 32,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: int = 18,
        p: float = 1.0,
    ):
        super().__init__(p=p)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def get_params(self) -> dict[str, Any]:
        """Draw which distortions are done, each with probability a half, and how strongly."""
        draw = self.py_random

        def maybe(low: float, high: float) -> float | None:
            value, done = draw.uniform(low, high), draw.random() < 0.5
            return value if done else None

        return {
            "shift": maybe(-self.brightness, self.brightness),
            "contrast": maybe(*self.contrast),
            "contrast_last": draw.random() < 0.5,
            "saturation": maybe(*self.saturation),
            "hue": draw.randint(-self.hue, self.hue) if draw.random() < 0.5 else None,
        }

    def apply(self, img: np.ndarray, shift, contrast, contrast_last, saturation, hue, **params) -> np.ndarray:
        """Distort an RGB image ``[H, W, 3]`` of uint8, rounding down after every step."""
        if shift is not None:
            img = _scale(img, 1, shift)
        if contrast is not None and not contrast_last:
            img = _scale(img, contrast, 0)
        if saturation is not None or hue is not None:
            hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
            if saturation is not None:
                hsv[..., 1] = _scale(hsv[..., 1], saturation, 0)
            if hue is not None:
                hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
            img = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if contrast is not None and contrast_last:
            img = _scale(img, contrast, 0)
        return img


def _scale(img: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return np.clip(img.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


# What a recipe may say under data.augment, with what it means by default.
SETTINGS = {
    "shorts": None,  # lengths of the short side, one of which is drawn; None: no resize
    "long": 1333,  # greatest length of the long side
    "ratio": None,  # interval of a factor of both
    "crop": None,  # side of the window, or (height, width)
    "max_share": 1.0,  # of a class in the window
    "crop_policy": False,  # DETR's: half of the images are resized and cropped before
    "flip": 0.5,  # probability of mirroring
    "flip_vertical": 0.0,
    "rotate": 0.0,  # probability of a rotation by a multiple of 90 degrees
    "distortion": False,  # photometric
    "transforms": (),  # any of albumentations', after these: dict(type="GaussNoise", p=0.5), ...
}


def build_transforms(described: Sequence[Mapping[str, Any]]) -> list[albumentations.BasicTransform]:
    """Return albumentations' transforms that a config describes.

    Args:
        described: For each its ``type``, a name in albumentations, and its arguments; those of a composition, such as
            ``"OneOf"``, have such descriptions in ``transforms``.

    Raises:
        TaskError: If there is no such transform, or it doesn't take an argument.
    """
    steps = []
    for number, entry in enumerate(described):
        place = f"data.augment.transforms[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
            raise TaskError(f'{place} is {entry!r}; a transform is dict(type="GaussNoise", ...)')
        arguments = dict(entry)
        name = arguments.pop("type")
        kind = getattr(albumentations, name, None)
        if not (
            isinstance(kind, type) and issubclass(kind, (albumentations.BasicTransform, albumentations.BaseCompose))
        ):
            known = [known for known in dir(albumentations) if known[0].isupper()]
            raise TaskError(f"{place}: albumentations has no {name!r}{nearest(name, known)}")
        if "transforms" in arguments:
            arguments["transforms"] = build_transforms(arguments["transforms"])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # what it doesn't know, it only warns of
                steps.append(kind(**arguments))
        except (TypeError, ValueError, UserWarning) as error:
            raise TaskError(f"{place}: {name}: {' '.join(str(error).split())}") from error
    return steps


class Augment:
    """A random chain for one image and what is annotated on it.

    Args:
        settings: Some of the keys of `SETTINGS`.
        channels: Of the images.

    Raises:
        TaskError: If a key is unknown or a value is no setting, or is for colours and the images have none.
    """

    def __init__(self, settings: dict[str, Any], channels: int = 3):
        for key in settings:
            if key not in SETTINGS:
                raise TaskError(f"data.augment: unknown key {key!r}{nearest(key, SETTINGS)}")
        options = SETTINGS | settings
        if options["distortion"] and channels != 3:
            raise TaskError(f"data.augment.distortion is for colours, not for {channels} channels")
        for key in ("shorts", "long", "crop"):
            sides = options[key] if isinstance(options[key], list | tuple) else (options[key],)
            check_sides(f"data.augment.{key}", *(side for side in sides if not isinstance(side, str)))
        steps: list[albumentations.BasicTransform] = []
        try:
            if options["crop_policy"]:
                # Resize to 400 .. 600 and cut 384 .. 600 pixels: DETR's second policy, with Swin's long side.
                before = [ResizeWithin((400, 500, 600), options["long"]), RandomWindow((384, 384), (600, 600))]
                steps.append(albumentations.Sequential(before, p=0.5))
            if options["shorts"] is not None:
                steps.append(ResizeWithin(tuple(options["shorts"]), options["long"], options["ratio"]))
            if options["crop"] is not None:
                crop = options["crop"]
                crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
                steps.append(RandomWindow(crop, crop, options["max_share"]))
            for key, transform in (
                ("flip", albumentations.HorizontalFlip),
                ("flip_vertical", albumentations.VerticalFlip),
                ("rotate", albumentations.RandomRotate90),
            ):
                if options[key]:
                    steps.append(transform(p=options[key]))
            if options["distortion"]:
                steps.append(PhotometricDistortion())
            steps += build_transforms(options["transforms"])
        except (TypeError, ValueError) as error:
            raise TaskError(f"data.augment: {' '.join(str(error).split())}") from error
        boxes = albumentations.BboxParams("pascal_voc", label_fields=["index"], clip=True, filter_invalid_bboxes=True)
        self._plain = albumentations.Compose(steps)
        self._boxed = albumentations.Compose(steps, bbox_params=boxes)
        self._steps = _with_inner(steps)
        # What geometric transforms leave empty is no class, unless a config says another.
        self._fills = [step for step in self._steps if getattr(step, "fill_mask", None) == 0]

    def __call__(self, image: np.ndarray, mask: np.ndarray, empty: int = IGNORE) -> tuple[np.ndarray, np.ndarray]:
        """Augment an image ``[H, W, C]``, uint8, with its label map ``[H, W]``; ``empty`` stands for no label."""
        _seed(self._steps)
        for step in self._fills:
            step.fill_mask = empty
        # OpenCV turns and bends no maps of 32 bits; labels fit into 8.
        done = self._plain(image=image, mask=mask.astype(np.uint8) if mask.dtype == np.int32 else mask)
        return _checked(done["image"]), done["mask"]

    def instances(
        self, image: np.ndarray, boxes: np.ndarray, masks: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """Augment an image with its objects; those of which no area is left are dropped.

        Args:
            image: ``[H, W, C]``, uint8.
            boxes: ``[N, 4]``, ``x1, y1, x2, y2`` in pixels.
            masks: ``[N, H, W]``, uint8, or None.

        Returns:
            Image, boxes ``[M, 4]``, masks ``[M, H', W']`` or None, and the index ``[M]`` of each object that is left.
        """
        _seed(self._steps)
        given = {"image": image, "bboxes": boxes.reshape(-1, 4), "index": np.arange(len(boxes))}
        if masks is not None and len(masks):
            given["masks"] = masks
        done = self._boxed(**given)
        index = np.asarray(done["index"], dtype=np.int64).reshape(-1)
        boxes = np.asarray(done["bboxes"], dtype=np.float64).reshape(-1, 4)
        if masks is not None:
            masks = (
                np.asarray(done["masks"])[index] if len(masks) else np.zeros((0, *done["image"].shape[:2]), np.uint8)
            )
        left = has_area(boxes, masks).numpy()
        return _checked(done["image"]), boxes[left], None if masks is None else masks[left], index[left]


class ImageTransforms:
    """Albumentations' transforms of an image without annotations, as a step of torchvision's.

    Args:
        described: As for `build_transforms`.
    """

    def __init__(self, described: Sequence[Mapping[str, Any]]):
        steps = build_transforms(described)
        self._compose, self._steps = albumentations.Compose(steps), _with_inner(steps)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the transformed image, of the same mode."""
        _seed(self._steps)
        pixels = np.asarray(image)
        grey = pixels.ndim == 2
        done = _checked(self._compose(image=pixels[..., None] if grey else pixels)["image"])
        if isinstance(image, Bands):
            return Bands(done)
        return Image.fromarray(done[..., 0] if grey and done.ndim == 3 else done)


def _seed(steps: Sequence[Any]) -> None:
    """Give each transform a stream of its own: albumentations would give all of them the same."""
    for step, seed in zip(steps, torch.randint(2**31, (len(steps),)).tolist(), strict=True):
        step.set_random_seed(seed)


def _with_inner(steps: Sequence[Any]) -> list[Any]:
    """Return transforms, each followed by those that it is composed of."""
    return [inner for step in steps for inner in (step, *_with_inner(getattr(step, "transforms", ())))]


def _checked(image: np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = getattr(image, "dtype", type(image).__name__)
        raise TaskError(f"data.augment.transforms: make images of 0 to 255 as uint8, not {kind}; the model normalises")
    return image
