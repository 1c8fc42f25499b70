"""Pictures of segmentation: classes and segments laid over an image, truth beside prediction."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

from ..data.augment import IGNORE
from ..data.coco import decode_masks
from ..data.images import as_picture
from .figures import GREY, add_legend, choose_styles, new_figure, save_figure

_OUTLINE = 120  # a picture's longer side in widths of outlines
Styles = Mapping[int, tuple[str, str | None]]


def draw_overlay(
    axes: Axes, image: Image.Image, labels: np.ndarray, styles: Styles, numbers: np.ndarray | None = None
) -> None:
    """Lay classes over an image; what has no class stays as it is.

    Args:
        axes: Where to draw.
        image: The image, RGB.
        labels: Class of every pixel, ``[H, W]``; those that ``styles`` doesn't know aren't drawn.
        styles: Colours of the classes, of `pictures.choose_styles`.
        numbers: Segment of every pixel, ``[H, W]``: segments of one class get shades of its colour, and outlines.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float32) / 255
    reach = max(1, round(max(image.size) / _OUTLINE))
    for label, (colour, _) in styles.items():
        inside = labels == label
        parts = [inside] if numbers is None else [inside & (numbers == number) for number in np.unique(numbers[inside])]
        for place, part in enumerate(parts):
            shade = np.array(_shade(colour, place if len(parts) > 1 else None))
            pixels[part] = 0.45 * pixels[part] + 0.55 * shade
            # A tint on a coloured image is a colour of neither: the outline alone is that of the legend.
            inner = cv2.erode(part.astype(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
            pixels[part & (inner == 0)] = shade
    axes.imshow(pixels, interpolation="nearest" if max(image.size) < 200 else "antialiased")
    for label, (_, stripes) in styles.items():
        inside = labels == label
        if stripes is not None and inside.any() and not inside.all():
            # Colours were not enough: stripes tell this class from the one of the same colour.
            axes.contourf(inside, levels=[0.5, 1.5], colors="none", hatches=[stripes])
    borders = _borders(labels if numbers is None else labels.astype(np.int64) * (1 << 32) + numbers)
    outline = np.zeros((*labels.shape, 4), np.float32)
    outline[borders & np.isin(labels, list(styles))] = (0, 0, 0, 0.8) if numbers is None else (1, 1, 1, 0.9)
    axes.imshow(outline, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _shade(colour: str, place: int | None) -> tuple[float, float, float]:
    """Return a colour, or one of its five shades."""
    if place is None:
        return to_rgb(colour)
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    return colorsys.hls_to_rgb(hue, min(max(light + (0.0, 0.18, -0.15, 0.28, -0.08)[place % 5], 0.1), 0.92), saturation)


def _borders(regions: np.ndarray) -> np.ndarray:
    """Return the pixels ``[H, W]`` whose right or lower neighbor is of another region."""
    borders = np.zeros(regions.shape, bool)
    borders[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    borders[:-1] |= regions[:-1] != regions[1:]
    return borders


def draw_segmentation(
    image: Image.Image, segmentation: Tensor, classes: Sequence[str], path: str | Path, things: Sequence[bool] = ()
) -> None:
    """Draw an image under its classes, or segments, with a legend that says how much of the image each has.

    Args:
        image: The image.
        segmentation: Class of every pixel ``[H, W]``, or class and number of its segment ``[H, W, 2]``.
        classes: Names of the classes.
        path: PNG to write.
        things: For each class whether its objects are told apart, and counted in the legend.
    """
    labels, numbers = _split(segmentation)
    styles = choose_styles(np.unique(labels).tolist(), classes)
    width = 8.0 * min(1.0, 1.2 * image.width / image.height)
    figure = new_figure(width, width * image.height / image.width + 0.6 + 0.25 * (1 + len(styles) // 4))
    draw_overlay(figure.subplots(), image, labels, styles, numbers)
    names = []
    for label in styles:
        inside = labels == label
        count = f"{len(np.unique(numbers[inside]))}, " if numbers is not None and things[label] else ""
        names.append(f"{classes[label]} ({count}{inside.mean():.1%})")
    add_legend(figure, names, list(styles.values()))
    save_figure(figure, path)


def draw_inputs(
    images: Sequence[Image.Image], truths: Sequence[Any], classes: Sequence[str], path: str | Path, title: str
) -> None:
    """Draw images as a segmenter gets them, under their truth; pixels that don't count are grey.

    Args:
        images: RGB images.
        truths: Of each, as `SegmentationSet` has it: classes ``[H, W]``, classes and numbers of segments ``[H, W, 2]``,
            or a dict of ``labels`` ``[N]`` and ``masks``, ``[N, H, W]`` or run lengths.
        classes: Names of the classes.
        path: PNG to write.
        title: What is shown.
    """
    split = [
        _paint(truth, image) if isinstance(truth, Mapping) else _split(truth)
        for truth, image in zip(truths, images, strict=True)
    ]
    styles = choose_styles((label for labels, _ in split for label in np.unique(labels).tolist()), classes)
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    ratio = max(image.height / image.width for image in images)
    figure = new_figure(max(5.0, 3.4 * columns), min(3.4 * ratio, 6.8) * rows + 0.9 + 0.25 * (len(styles) // 7))
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, image, (labels, numbers) in zip(panels, images, split, strict=False):
        draw_overlay(axes, image, labels, styles, numbers)
        hidden = np.zeros((*labels.shape, 4), np.float32)
        hidden[labels >= len(classes)] = (*to_rgb(GREY), 0.7)
        axes.imshow(hidden, interpolation="nearest")
        axes.set_title(f"{image.height}x{image.width} pixels", fontsize=8)
    add_legend(figure, [classes[label] for label in styles], list(styles.values()))
    save_figure(figure, path)


def _paint(truth: Mapping[str, Any], image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the class and the number of the mask of every pixel; later masks lie over earlier ones."""
    masks = truth["masks"]
    masks = masks.numpy() if isinstance(masks, Tensor) else decode_masks(masks, image.height, image.width)
    labels = np.full((image.height, image.width), IGNORE, np.int32)
    numbers = np.zeros_like(labels)
    for number, (mask, label) in enumerate(zip(masks, truth["labels"].tolist(), strict=True), start=1):
        labels[mask > 0], numbers[mask > 0] = label, number
    return labels, numbers


def draw_comparison(
    rows: Sequence[tuple[Image.Image, Tensor, Tensor]],
    classes: Sequence[str],
    path: str | Path,
    title: str,
    things: Sequence[bool] = (),
) -> None:
    """Draw images, their truth and what was predicted side by side; pixels that don't count are grey in both.

    Args:
        rows: ``(image, truth, prediction)``, a row of panels for each; truth and prediction as for `draw_segmentation`.
        classes: Names of the classes.
        path: PNG to write.
        title: What is shown.
        things: As for `draw_segmentation`.
    """
    split = [(image, _split(truth), _split(predicted)) for image, truth, predicted in rows]
    maps = [labels for _, (truth, _), (predicted, _) in split for labels in (truth, predicted)]
    styles = choose_styles((label for labels in maps for label in np.unique(labels).tolist()), classes)
    heights = [4.2 * min(image.height / image.width, 2.0) for image, *_ in split]
    figure = new_figure(12.6, sum(heights) + 0.5 * len(split) + 0.9 + 0.25 * (len(styles) // 7))
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(len(split), 3, squeeze=False, height_ratios=heights)
    for (left, middle, right), (image, (truth, true_numbers), (predicted, numbers)) in zip(panels, split, strict=True):
        void = truth >= len(classes)
        left.imshow(as_picture(image), interpolation="nearest" if max(image.size) < 200 else "antialiased")
        left.set(xticks=[], yticks=[])
        left.set_title("image", fontsize=9)
        for axes, labels, parts, name in (
            (middle, truth, true_numbers, "truth"),
            (right, predicted, numbers, "prediction"),
        ):
            draw_overlay(axes, image, labels, styles, parts)
            if void.any():
                hidden = np.zeros((*void.shape, 4), np.float32)
                hidden[void] = (*to_rgb(GREY), 0.7)
                axes.imshow(hidden, interpolation="nearest")
            axes.set_title(name + _summary(labels, parts, truth, classes, things, name), fontsize=9)
    add_legend(figure, [classes[label] for label in styles], list(styles.values()))
    save_figure(figure, path)


def _split(segmentation: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    array = segmentation.numpy()
    return (array, None) if array.ndim == 2 else (array[..., 0], array[..., 1])


def _summary(
    labels: np.ndarray,
    numbers: np.ndarray | None,
    truth: np.ndarray,
    classes: Sequence[str],
    things: Sequence[bool],
    name: str,
) -> str:
    """Return the counts of segments, or for a prediction of labels the share of pixels that are right."""
    if numbers is not None:
        counted = np.isin(labels, [label for label in range(len(classes)) if things[label]])
        return f": {len(np.unique(numbers[counted]))} objects"
    if name == "truth":
        return ""
    valid = truth != IGNORE
    return f": {(labels == truth)[valid].mean():.1%} of the pixels right" if valid.any() else ""
