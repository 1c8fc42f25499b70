"""Pictures of classification: a gallery of predictions, the confusion matrix, one annotated image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.images import as_picture
from .figures import BLUE, GREEN, GREY, RED, new_figure, save_figure


def draw_gallery(
    images: Sequence[Image.Image],
    truths: Sequence[str],
    predictions: Sequence[Sequence[tuple[str, float]]],
    path: str | Path,
    title: str,
    columns: int = 10,
) -> None:
    """Draw images with truth and prediction; the wrong ones are framed and marked.

    Args:
        images: Pictures of any size.
        truths: The class of each.
        predictions: ``(class, probability)`` of each, the likeliest first.
        path: PNG to write.
        title: What is shown.
        columns: Images in a row.
    """
    rows = -(-len(images) // columns)
    figure = new_figure(1.15 * columns, 1.5 * rows + 0.5)
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.axis("off")
    for axes, image, truth, ranking in zip(panels, images, truths, predictions, strict=False):
        (guess, probability), right = ranking[0], ranking[0][0] == truth
        axes.axis("on")
        axes.imshow(as_picture(image), cmap="gray", interpolation="nearest")
        axes.spines[:].set(color=GREEN if right else RED, linewidth=1 if right else 3)
        text = f"{guess} ({probability:.0%})" if right else f"✗ {guess} ({probability:.0%})\ntruth: {truth}"
        axes.set_title(text, fontsize=8, color="black" if right else RED, fontweight="normal" if right else "bold")
    save_figure(figure, path)


def draw_inputs(
    images: Sequence[np.ndarray], labels: Sequence[str], path: str | Path, title: str, columns: int = 6
) -> None:
    """Draw images with the names of their classes.

    Args:
        images: Pixels of 0 to 1, ``[H, W, channels]``.
        labels: What is written above each.
        path: PNG to write.
        title: What is shown.
        columns: Images in a row.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(max(5.0, 1.9 * columns), 2.2 * rows + 0.6)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, image, label in zip(panels, images, labels, strict=False):
        interpolation = "nearest" if max(image.shape[:2]) < 64 else "antialiased"
        shown = image[..., :3] if image.shape[-1] > 2 else image[..., 0]
        axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation=interpolation)
        axes.set_title(label, fontsize=8)
    save_figure(figure, path)


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], path: str | Path, of: str = "") -> None:
    """Draw how often each class was taken for each other; numbers are written where they can be read.

    Args:
        matrix: Counts, a row for each true class and a column for each predicted one.
        classes: Names of both.
        path: PNG to write.
        of: What is counted, where that isn't images.
    """
    count = len(classes)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(12, 3 + 0.42 * count)
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    shades = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shades, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{np.trace(matrix)} of {matrix.sum()}{of and f' {of}'} right")
    if count <= 40:
        axes.set_xticks(range(count), classes, rotation=90 if max(map(len, classes)) > 3 else 0)
        axes.set_yticks(range(count), classes)
    if count <= 25:
        for row, column in np.argwhere(matrix):
            wrong = row != column
            axes.text(
                column,
                row,
                matrix[row, column],
                ha="center",
                va="center",
                fontsize=9,
                color=RED if wrong else "white" if share[row, column] > 0.5 else "black",
                fontweight="bold" if wrong else "normal",
            )
    save_figure(figure, path)


def draw_prediction(image: Image.Image, ranking: Sequence[tuple[str, float]], path: str | Path) -> None:
    """Draw an image beside bars of its likeliest classes."""
    figure = new_figure(7.2, 3.4)
    picture, bars = figure.subplots(1, 2, width_ratios=(1.1, 1))
    picture.imshow(as_picture(image), cmap="gray", interpolation="nearest" if max(image.size) < 64 else "antialiased")
    picture.axis("off")
    names = [name if len(name) < 32 else f"{name[:30]}…" for name, _ in ranking]
    probabilities = [probability for _, probability in ranking]
    places = range(len(ranking))
    bars.barh(places, probabilities, color=[BLUE] + [GREY] * (len(ranking) - 1), height=0.45)
    for place, name, probability in zip(places, names, probabilities, strict=True):
        bars.text(0, place - 0.33, f"{name}  {probability:.1%}", va="bottom", fontsize=9)
    bars.set(xlim=(0, 1), ylim=(len(ranking) - 0.5, -0.9))
    bars.axis("off")
    save_figure(figure, path)
