"""Pictures of any task: learning curves, and what a query of neighborhood attention sees."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from PIL import Image
from torch import Tensor, nn

from ...blocks import NeighborhoodAttention2d
from ...kernels.neighborhood.window import axis_windows
from .. import TaskError, printable
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
        if any(label != printable(label) for label in labels):  # else they are made anew as the figure is drawn
            axis.set_ticks(axis.get_majorticklocs(), labels=map(printable, labels))
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def choose_styles(labels: Iterable[int], classes: Sequence[str]) -> dict[int, tuple[str, str | None]]:
    """Return a colour and a pattern of stripes, or None, for each class that a picture shows; background has none."""
    shown = sorted(label for label in set(labels) if label < len(classes) and classes[label] != "background")
    return {
        label: (PALETTE[place % len(PALETTE)], STRIPES[place // len(PALETTE) % len(STRIPES)])
        for place, label in enumerate(shown)
    }


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


@torch.no_grad()
def find_neighborhoods(model: nn.Module, inputs: Tensor) -> list[tuple[str, NeighborhoodAttention2d, Tensor]]:
    """Run a model and return, for every block of neighborhood attention, its name, itself and its weights.

    Args:
        model: Any model with `NeighborhoodAttention2d` inside.
        inputs: One image ``[1, C, H, W]``.

    Returns:
        ``(name, block, weights)`` with ``weights`` ``[H', W', heads, neighbors]`` on the block's map.
    """
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda block, args, name=name: seen.append((name, block, args[0])))
        for name, module in model.named_modules()
        if isinstance(module, NeighborhoodAttention2d)
    ]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [(name, block, block.attention_map(x)[0].float().cpu()) for name, block, x in seen]


def draw_neighborhoods(
    image: Image.Image,
    model: nn.Module,
    inputs: Tensor,
    queries: Sequence[tuple[float, float]],
    path: str | Path,
    blocks: int = 3,
) -> None:
    """Draw, on an image, the keys that queries see in blocks of a model, with their attention weights.

    Blocks whose window fits into their map come first; a smaller map is padded, and the title says how much of the
    attention goes there.

    Args:
        image: The image as it is shown; ``inputs`` shows the same frame.
        model: A model with neighborhood attention.
        inputs: The image as the model's input, ``[1, C, H, W]``.
        queries: Where to ask, each as fractions ``(down, right)`` of the image; a row of panels for each.
        path: PNG to write.
        blocks: Blocks to draw, a column for each.

    Raises:
        TaskError: If the model has no neighborhood attention.
    """
    attentions = find_neighborhoods(model, inputs)
    if not attentions:
        raise TaskError(f"{type(model).__name__} has no neighborhood attention to draw")
    order = sorted(
        range(len(attentions)),
        key=lambda i: any(np.less(attentions[i][2].shape[:2], attentions[i][1].least)) * len(attentions) + i,
    )
    drawn = [attentions[i] for i in order[:blocks]]
    figure = new_figure(3.3 * (len(drawn) + 1), 3.9 * len(queries))
    rows = figure.subplots(len(queries), len(drawn) + 1, squeeze=False)
    frame = {"extent": (0, 1, 1, 0), "aspect": image.height / image.width, "interpolation": "nearest"}
    for query, panels in zip(queries, rows, strict=True):
        for axes in panels:
            axes.imshow(image, cmap="gray", **frame)
            axes.set(xticks=[], yticks=[])
        panels[0].set_title("image and query", fontsize=10)
        panels[0].plot(query[1], query[0], marker="x", color=RED, markersize=12, markeredgewidth=3, clip_on=False)
        for axes, (name, block, weights) in zip(panels[1:], drawn, strict=True):
            height, width = weights.shape[:2]
            place = (min(int(query[0] * height), height - 1), min(int(query[1] * width), width - 1))
            share, beyond = _lay_on_map(block, weights[place], place, (height, width))
            shades = axes.imshow(share, cmap="viridis", alpha=0.75, vmin=0, vmax=np.nanmax(share), **frame)
            for row, column in [*np.argwhere(~np.isnan(share)), place]:
                key = {"ec": RED, "lw": 2.5} if (row, column) == place else {"ec": GREY, "lw": 0.6}
                axes.add_patch(Rectangle((column / width, row / height), 1 / width, 1 / height, fill=False, **key))
            window, dilation = ("x".join(map(str, value)) for value in (block.kernel_size, block.dilation))
            lines = [name, f"{height}x{width} map, window {window}, dilation {dilation}"]
            if beyond > 1e-4:
                lines.append(f"{beyond:.0%} of the attention on padding")
            axes.set_title("\n".join(lines), fontsize=9)
            bar = figure.colorbar(shades, ax=axes, location="bottom", shrink=0.85, pad=0.03)
            bar.set_label("attention weight, mean of heads", fontsize=8)
            bar.ax.tick_params(labelsize=7)
            bar.ax.locator_params(nbins=5)
    save_figure(figure, path)


def _lay_on_map(
    block: NeighborhoodAttention2d, weights: Tensor, place: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """Return a query's weights, averaged over heads, on its map (NaN where it sees nothing), and those beyond it.

    Args:
        block: The attention.
        weights: Of the query, ``[heads, neighbors]``.
        place: Row and column of the query.
        size: Height and width of the map.
    """
    windows = [
        axis_windows(max(length, least), *settings)[position]
        for length, least, position, *settings in zip(
            size, block.least, place, block.kernel_size, block.dilation, block.stride, block.is_causal, strict=True
        )
    ]
    # Keys beyond the map are padding; a causal window has -1 where it holds fewer.
    on_map = [(keys >= 0) & (keys < length) for keys, length in zip(windows, size, strict=True)]
    share = weights.mean(0).reshape(*block.kernel_size).numpy()[np.ix_(*on_map)]
    laid = np.full(size, np.nan)
    laid[np.ix_(*(keys[inside] for keys, inside in zip(windows, on_map, strict=True)))] = share
    return laid, float(1 - share.sum())
