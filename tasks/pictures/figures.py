"""Figures, colours and legends of all pictures, and learning curves."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from .. import printable
from ..checkpoints import write_whole

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"
# All of them, for classes; where there are more classes than colours, stripes tell those of one colour apart.
PALETTE = (ORANGE, BLUE, "#F0E442", GREEN, "#CC79A7", "#56B4E9", RED, "#DDDDDD")
STRIPES = (None, "////", "....", "xxxx")
# Those that are dark enough for thin lines, without the blue of the line in bold.
_THIN = (ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", GREY, "black")


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of ``width x height`` inches that needs neither display nor pyplot's global state."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG; names in it are shown as they are, not as markup."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_majorticklabels()]
        if any(label != _shown(label) for label in labels):  # else they are made anew as the figure is drawn
            axis.set_ticks(axis.get_majorticklocs(), labels=map(_shown, labels))
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(_shown(text.get_text()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # of images one pixel high or wide
        write_whole(path, lambda file: figure.savefig(file, format="png"))


def _shown(text: str) -> str:
    """Return a text as pictures have room for it: a word of hundreds of letters would leave none for the axes."""
    return re.sub(r"\S{40,}", lambda word: f"{word[0][:37]}...", printable(text))


def choose_styles(labels: Iterable[int], classes: Sequence[str]) -> dict[int, tuple[str, str | None]]:
    """Return a colour and a pattern of stripes, or None, for each class that a picture shows; background has none.

    They are a class's own, so that it has them in every picture. Of more than 32 classes several have the same; where a
    picture shows two of these, the second takes the next that is free.
    """
    styles = [(colour, stripes) for stripes in STRIPES for colour in PALETTE]
    numbers = {label: place for place, label in enumerate(i for i, name in enumerate(classes) if name != "background")}
    of_class: dict[int, tuple[str, str | None]] = {}
    for label in sorted({*labels} & numbers.keys()):
        place = numbers[label]
        free = (styles[(place + step) % len(styles)] for step in range(len(styles)))
        of_class[label] = next((style for style in free if style not in of_class.values()), styles[place % len(styles)])
    return of_class


def add_legend(figure: Figure, names: Sequence[str], styles: Sequence[tuple[str, str | None]]) -> None:
    """Add a legend of classes below everything that the figure shows."""
    handles = [
        Patch(facecolor=colour, hatch=stripes, edgecolor="black", linewidth=0.6, label=name)
        for name, (colour, stripes) in zip(names, styles, strict=True)
    ]
    if handles:
        columns = max(1, min(len(handles), int(figure.get_figwidth() // 1.7)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def draw_curve(history: list[dict], metric: str, path: str | Path) -> None:
    """Draw training loss, held-out loss and a held-out metric over the epochs of a run's history."""
    figure = new_figure(8, 3.4)
    losses, metrics = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    measured = [entry for entry in history if f"val/{metric}" in entry]
    losses.plot(epochs, [entry["train/loss"] for entry in history], color=BLUE, lw=2, label="training")
    parts = sorted(key for key in history[-1] if key.startswith("train/") and key != "train/loss")
    for index, key in enumerate(parts if 1 < len(parts) <= len(_THIN) else ()):
        style = {"color": _THIN[index], "linestyle": ("--", ":", "-.")[index % 3]}
        values = [entry.get(key, np.nan) for entry in history]
        losses.plot(epochs, values, linewidth=1, label=key.removeprefix("train/"), **style)
    if all("val/loss" in entry for entry in measured):
        losses.plot(
            [entry["epoch"] for entry in measured],
            [entry["val/loss"] for entry in measured],
            color=ORANGE,
            label="held out",
        )
    losses.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    losses.legend(frameon=False)
    values = [entry[f"val/{metric}"] for entry in measured]
    metrics.plot([entry["epoch"] for entry in measured], values, color=ORANGE, marker=".")
    metrics.set(xlabel="epoch", ylabel=f"held-out {metric}")
    if values:
        metrics.annotate(
            f"{values[-1]:.4f}", (measured[-1]["epoch"], values[-1]), (0, 6), textcoords="offset points", ha="center"
        )
        metrics.margins(x=0.08, y=0.12)
    for axes in (losses, metrics):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def draw_curves(histories: Mapping[str, Sequence[dict]], scalars: Sequence[str], path: str | Path) -> None:
    """Draw scalars of several runs over their epochs, a panel for each scalar and a line for each run.

    Args:
        histories: For the name of each run, its entries with ``epoch`` and scalars; not every entry need have them all.
        scalars: What to draw.
        path: PNG to write.
    """
    columns = min(3, len(scalars))
    rows = -(-len(scalars) // columns)
    figure = new_figure(4.2 * columns, 3.1 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = (BLUE, *_THIN)
    styles = {
        name: {"color": colours[place % len(colours)], "linestyle": ("-", "--", ":")[place // len(colours) % 3]}
        for place, name in enumerate(histories)
    }
    for axes, scalar in zip(panels, scalars, strict=False):
        for name, history in histories.items():
            points = [(entry["epoch"], entry[scalar]) for entry in history if entry.get(scalar) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), lw=1.8, marker="." if len(points) < 30 else None, **styles[name])
        words = {"lr": "learning rate"}.get(scalar, scalar.replace("train/", "training ").replace("val/", "held-out "))
        axes.set(xlabel="epoch", ylabel=words)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if scalar.endswith("loss"):
            axes.set_ylim(bottom=0)
    for axes in panels[len(scalars) :]:
        axes.axis("off")
    handles = [Line2D([], [], lw=2, label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)
    save_figure(figure, path)
