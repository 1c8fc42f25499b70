"""Pictures of detection: objects on an image, truth beside prediction, precision by recall."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from .. import printable
from ..data.coco import decode_masks, encode_mask
from ..data.images import Bands, as_picture
from ..detections import keep_likely
from .figures import BLUE, GREEN, ORANGE, add_legend, choose_styles, new_figure, save_figure
from .naming import place_names

# More objects than this get no text of their own: the legend says what they are.
NAMED = 25
_POINTS = 7  # height of letters


def draw_objects(
    axes: Axes,
    image: Image.Image,
    objects: Mapping[str, Any],
    classes: Sequence[str],
    styles: Mapping[int, tuple[str, str | None]],
    dashed: np.ndarray | None = None,
) -> None:
    """Draw boxes, masks, names and scores of objects on an image.

    Args:
        axes: Where to draw.
        image: The image, RGB.
        objects: ``boxes`` ``[N, 4]``, ``labels`` ``[N]``, and where there are any ``scores`` ``[N]`` and ``masks``, run
            lengths.
        classes: Names of the classes.
        styles: Colours of the classes, of `choose_styles`.
        dashed: Which objects to draw with a dashed line, bool ``[N]``.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float32) / 255
    labels = [int(label) for label in objects["labels"]]
    masks = decode_masks(objects["masks"], image.height, image.width) if "masks" in objects else []
    for mask, label in zip(masks, labels, strict=bool(len(masks))):
        inside = mask > 0
        pixels[inside] = 0.55 * pixels[inside] + 0.45 * np.array(to_rgb(styles[label][0]))
    axes.imshow(pixels, interpolation="nearest" if max(image.size) < 200 else "antialiased")
    axes.set(xticks=[], yticks=[], xlim=(-0.5, image.width - 0.5), ylim=(image.height - 0.5, -0.5))
    for mask, label in zip(masks, labels, strict=bool(len(masks))):
        if min(mask.shape) > 1 and mask.any() and not mask.all():  # a line of pixels has no outline
            axes.contour(mask, levels=[0.5], colors=[styles[label][0]], linewidths=1)
    for index, (box, label) in enumerate(zip(objects["boxes"].tolist(), labels, strict=True)):
        x1, y1, x2, y2 = (value - 0.5 for value in box)
        colour, stripes = styles[label]
        wrong = dashed is not None and dashed[index]
        line = "--" if wrong else ":" if stripes else "-"
        box_style = {"fill": False, "ec": colour, "lw": 2.2 if wrong else 1.2, "ls": line}
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **box_style))
    if len(labels) <= NAMED:
        scores = (
            [f" {score:.2f}" for score in objects["scores"].tolist()] if "scores" in objects else [""] * len(labels)
        )
        texts = [printable(classes[label]) + score for label, score in zip(labels, scores, strict=True)]
        _write_names(axes, image, np.asarray(objects["boxes"]) - 0.5, texts, [styles[label][0] for label in labels])


def _write_names(
    axes: Axes, image: Image.Image, boxes: np.ndarray, texts: Sequence[str], colours: Sequence[str]
) -> None:
    """Write a name at each box, none over another."""
    figure = axes.get_figure()
    # Pixels of the image for a point of the page, before the layout makes the panel a little larger.
    space = axes.get_window_extent()
    pixel = max(image.width / space.width, image.height / space.height) * figure.dpi / 72
    sizes = [(pixel * (_POINTS * 0.62 * len(text) + 2), pixel * (_POINTS * 1.25 + 2)) for text in texts]
    places = place_names(boxes.reshape(-1, 4), sizes, image.width, image.height)
    for (x, y), text, colour in zip(places, texts, colours, strict=True):
        style = {"fontsize": _POINTS, "va": "top", "clip_on": True}
        axes.text(x, y, text, bbox={"fc": colour, "ec": "none", "pad": 1}, **style)


def match_objects(
    predicted: Mapping[str, Any], truth: Mapping[str, Any], overlap: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Return which predictions are right, and which true objects are found, both bool.

    Predictions, best first, take the free object of their class with which their box overlaps most, if by ``overlap``.
    """
    right, met = np.zeros(len(predicted["labels"]), bool), np.zeros(len(truth["labels"]), bool)
    if not len(right) or not len(met):
        return right, met
    overlaps = box_iou(predicted["boxes"].double(), truth["boxes"].double()).numpy()
    overlaps[predicted["labels"].numpy()[:, None] != truth["labels"].numpy()] = 0
    for index in torch.argsort(predicted["scores"], descending=True, stable=True).tolist():
        best = int(np.where(met, -1, overlaps[index]).argmax())
        if not met[best] and overlaps[index, best] >= overlap:
            right[index] = met[best] = True
    return right, met


def draw_detections(
    image: Image.Image, objects: Mapping[str, Any], classes: Sequence[str], path: str | Path, threshold: float
) -> None:
    """Draw an image with the objects found in it whose score is at least ``threshold``, and a legend with counts."""
    objects = keep_likely(objects, threshold)
    styles = choose_styles(objects["labels"].tolist(), classes)
    width = 8.0 * min(1.0, 1.2 * image.width / image.height)
    figure = new_figure(width, width * image.height / image.width + 0.9)
    draw_objects(figure.subplots(), image, objects, classes, styles)
    figure.suptitle(f"{len(objects['labels'])} objects with a score of {threshold:g} or more", fontsize=10)
    names = [f"{classes[label]} ({int((objects['labels'] == label).sum())})" for label in styles]
    add_legend(figure, names, list(styles.values()))
    save_figure(figure, path)


def draw_comparison(
    rows: Sequence[tuple[Image.Image, Mapping[str, Any], Mapping[str, Any]]],
    classes: Sequence[str],
    path: str | Path,
    title: str,
    threshold: float = 0.5,
) -> None:
    """Draw images with their true objects on the left and what was found on the right; mistakes are dashed.

    Args:
        rows: ``(image, truth, prediction)``, a row of panels for each.
        classes: Names of the classes.
        path: PNG to write.
        title: What is shown.
        threshold: Least score of a prediction that is drawn.
    """
    shown = [(image, truth, keep_likely(predicted, threshold)) for image, truth, predicted in rows]
    styles = choose_styles(
        (label for _, *both in shown for objects in both for label in objects["labels"].tolist()), classes
    )
    heights = [4.6 * min(image.height / image.width, 2.0) for image, *_ in shown]
    figure = new_figure(9.6, sum(heights) + 0.5 * len(shown) + 0.9)
    figure.suptitle(f"{title}; a prediction is right if its box overlaps the true one by half (IoU)", fontsize=10)
    panels = figure.subplots(len(shown), 2, squeeze=False, height_ratios=heights)
    for (left, right), (image, truth, predicted) in zip(panels, shown, strict=True):
        hits, met = match_objects(predicted, truth)
        draw_objects(left, image, truth, classes, styles, ~met)
        draw_objects(right, image, predicted, classes, styles, ~hits)
        left.set_title(f"truth: {len(met)} objects, {(~met).sum()} missed (dashed)", fontsize=9)
        right.set_title(
            f"predicted, score from {threshold:g}: {len(hits)}, of which {(~hits).sum()} wrong (dashed)", fontsize=9
        )
    add_legend(figure, [classes[label] for label in styles], list(styles.values()))
    save_figure(figure, path)


def draw_inputs(
    items: Sequence[tuple[Tensor, Mapping[str, Any]]], classes: Sequence[str], path: str | Path, title: str
) -> None:
    """Draw images as a detector gets them, with their objects.

    Args:
        items: Images ``[C, H, W]``, uint8, with ``boxes``, ``labels`` and perhaps ``masks``, of a `DetectionSet`.
        classes: Names of the classes.
        path: PNG to write.
        title: What is shown.
    """
    styles = choose_styles((label for _, target in items for label in target["labels"].tolist()), classes)
    columns = min(4, len(items))
    rows = -(-len(items) // columns)
    ratio = max(image.shape[1] / image.shape[2] for image, _ in items)
    figure = new_figure(max(5.0, 3.4 * columns), min(3.4 * ratio, 6.8) * rows + 0.9)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, (image, target) in zip(panels, items, strict=False):
        objects = dict(target)
        if isinstance(target.get("masks"), Tensor):
            objects["masks"] = [encode_mask(mask) for mask in target["masks"].numpy()]
        draw_objects(axes, as_picture(Bands(image.permute(1, 2, 0).numpy())), objects, classes, styles)
        height, width = image.shape[1:]
        axes.set_title(f"{height}x{width} pixels, {len(target['labels'])} objects", fontsize=8)
    add_legend(figure, [classes[label] for label in styles], list(styles.values()))
    save_figure(figure, path)


def draw_precision(measured: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw precision by recall, as COCO interpolates it, at three overlaps, averaged over classes.

    Args:
        measured: Of ``"box"``, and of ``"mask"`` where there are masks, what `measure_ap` returned.
        path: PNG to write.
    """
    figure = new_figure(4.6 * len(measured), 4)
    panels = figure.subplots(1, len(measured), squeeze=False)[0]
    recall = np.linspace(0, 1, 101)
    for axes, (kind, values) in zip(panels, measured.items(), strict=True):
        precision = np.where(values["precision"] < 0, np.nan, values["precision"])
        counted = ~np.isnan(precision).all((0, 1))
        for place, overlap, colour, line in ((0, 0.5, BLUE, "-"), (5, 0.75, ORANGE, "--"), (8, 0.9, GREEN, ":")):
            curve = precision[place][:, counted].mean(1) if counted.any() else np.zeros(101)
            axes.plot(recall, curve, line, color=colour, lw=2, label=f"IoU {overlap:g}: AP {curve.mean():.3f}")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(
            {"box": "boxes", "mask": "masks"}[kind] + f": AP {values['ap']:.3f} over IoU 0.5 to 0.95", fontsize=10
        )
        axes.legend(framealpha=0.9, edgecolor="none", loc="lower left", fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
