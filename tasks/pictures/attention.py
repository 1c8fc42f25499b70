"""Pictures of attention on the photo as it is: what a query uses in each layer, by kind, and where a class comes from.

Nothing is coloured that a query cannot see.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, PercentFormatter
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .. import TaskError
from ..seeing.call import AttentionCall, Use
from ..seeing.cam import Target, cam_layer, evaluating, grad_cam, target_indices, target_logits
from ..seeing.record import Record, record_attention
from ..seeing.rollout import Pixel, Read, relevance, rollout
from .attention_marks import (
    ALPHA,
    HEAT,
    Legend,
    Place,
    Query,
    Region,
    draw_gathered,
    draw_heat,
    draw_marks,
    draw_seen,
    gate_on_map,
    mark_query,
    queries_of,
    symmetric,
)
from .figures import BLUE, new_figure

METHODS = ("query", "rollout", "relevance", "cam")
# Of the maps that are not of a query.
_UNITS = {"rollout": "share of a token", "relevance": "relevance of a token", "cam": "of the largest"}
# Panels of a model whose maps have one size.
_PANELS = 4
# Inches that fit a page, so that words of 8 points can be read there, and what stands side by side.
_WIDTH, _COLUMNS, _HEADS = 8.3, 3, 4
# So many numbers at a bar that none runs into the next.
_TICKS = 4
# Pixels of a photo's longer side that are drawn.
_SIDE = 1000

Extent = tuple[float, float, float, float]


class Look(NamedTuple):
    """What one query uses in one attention.

    Attributes:
        call: The attention.
        query: What was asked about.
        tokens: The query's numbers in the attention; none of a gate or of channels.
        use: What they use on average; None of a gate or of channels.
    """

    call: AttentionCall
    query: Query
    tokens: list[int]
    use: Use | None


class Explained(NamedTuple):
    """A map of an image by a method other than ``"query"``.

    Attributes:
        method: The method.
        values: Of tokens or of pixels, ``[h, w]``.
        words: What is said of it.
        marks: Places in pixels of the input that were asked about.
    """

    method: str
    values: Tensor
    words: str
    marks: list[Place]


def picture(
    model: nn.Module,
    x: Tensor,
    at: Query | Sequence[Query] | None = None,
    method: str = "query",
    layers: str | Sequence[str] | None = None,
    target: Target = None,
    heads: bool = False,
    image: Image.Image | None = None,
    extent: Extent | None = None,
    observed: Sequence[Sequence[Look]] | Sequence[Explained] | None = None,
) -> Figure:
    """Draw what a model's attention uses, on the photo as it is.

    ``"query"``: for each query the photo, then a panel for each layer. The heat is the mean of the heads' weights on
    the tokens that the query sees, nothing else being coloured; its scale ends at the largest weight, and a line says
    what equal weights would be. Drawn besides are the outline of what is seen (windows, neighborhoods, stripes),
    regions with their rank (routing), levels (a tree), points with their offsets and sizes (deformable), and the agents
    that a query reads from, with a panel of what the one gathers that is read most (agent). Attention between channels
    is drawn as the matrix that it is, and gates, which are drawn where there is nothing else, as what they multiply by.
    The other methods draw one map of the image: `rollout`, `relevance` (without what came through shortcuts alone),
    both for each query if there are any, else of what the classifier reads; or `grad_cam`, with the queries marked.

    Args:
        model: A model that `record_attention` reads; a classifier for ``"relevance"`` and ``"cam"``.
        x: One image ``[1, C, H, W]``, normalised.
        at: Queries ``(x, y)`` in pixels of ``x``, or `Region`s of it, whose queries are averaged; the centre by
            default, if the method is ``"query"``.
        method: ``"query"``, ``"rollout"``, ``"relevance"`` or ``"cam"``.
        layers: Globs of attentions; by default the last one on each size of map, or four of all depths.
        target: Class that is explained; the likeliest if None.
        heads: Whether to draw each head of the last of the layers, for one query, instead of their mean.
        image: The photo; made of ``x`` by the model's mean and standard deviation by default.
        extent: Where the photo's left, right, bottom and top edge are in pixels of ``x``; those of ``x`` by default.
        observed: What is drawn, where it was asked already: for each query what `look` returned, or what
            `explain_image` did.

    Returns:
        A figure of matplotlib, with ``savefig``.

    Raises:
        TaskError: If the method is unknown, there are several images, a query is not on the image, or nothing can be
            drawn of the model.

    Example:
        >>> model = timm.create_model("nat_atto").eval()
        >>> figure = foveate.explain.picture(model, torch.randn(1, 3, 64, 64), at=(20, 30))
    """
    if method not in METHODS:
        raise TaskError(f"method is one of {', '.join(map(repr, METHODS))}; got {method!r}")
    if x.ndim != 4 or len(x) != 1:
        raise TaskError(f"a picture is of one image [1, C, H, W]; got {list(x.shape)}")
    photo = _photo(model, x, image, extent)
    height, width = photo.size
    queries = [] if at is None else [at] if _is_one(at) else list(at)
    for query in queries:
        if isinstance(query, Region) and method != "query":
            raise TaskError(f"{method} is of places, not of regions such as {query.name}")
        if isinstance(query, Region):
            if query.mask.shape != (height, width) or not query.mask.any():
                raise TaskError(f"{query.name} is no part of an image of {width}x{height} pixels")
        elif not (0 <= query[0] < width and 0 <= query[1] < height):
            raise TaskError(f"the image is {width}x{height} pixels; {tuple(query)} is not on it")
    if method != "query":
        if observed is None:
            observed = explain_image(model, x, method, layers, target, queries)
        return _draw_maps(observed, photo)
    if observed is None:
        calls = drawable(record_once(model, x, layers), layers)
        queries = queries or [(width / 2, height / 2)]
        observed = [look(calls, query) for query in queries]
    if not heads:
        return _draw_queries(observed, photo)
    mixing = [at for at in observed[0] if at.use is not None]
    if not mixing:
        raise TaskError("what was recorded are gates or channels, which have no heads that look at positions")
    return _draw_heads(mixing[-1], photo)


def _is_one(at: Query | Sequence[Query]) -> bool:
    return isinstance(at, Region) or np.isscalar(at[0])


@torch.no_grad()
def record_once(model: nn.Module, x: Tensor, layers: str | Sequence[str] | None = None) -> Record:
    """Record one forward pass in evaluation mode."""
    with evaluating(model), record_attention(model, layers) as record:
        model(x)
    return record


def _mixes(call: AttentionCall) -> bool:
    return call.kind not in ("gate", "channel")


def drawable(record: Record, layers: str | Sequence[str] | None = None) -> list[AttentionCall]:
    """Return the calls on maps: all if they were named, else some of all depths, and gates if there is nothing else.

    Raises:
        TaskError: If there is none.
    """
    calls = [call for call in record.values() if len(call.map_size) == 2]
    if not calls:
        raise TaskError("what was recorded is on no map; nothing can be drawn of it")
    if layers is not None:
        return calls
    if any(call.kind != "gate" for call in calls):
        calls = [call for call in calls if call.kind != "gate"]
    # Of several kinds on one map (windows beside points) each; of one size throughout, some of all depths.
    last = list({(call.map_size, call.kind): call for call in calls}.values())
    if len({call.map_size for call in last}) > 1 or len(calls) < _PANELS:
        return last
    return [calls[round(place * (len(calls) - 1) / (_PANELS - 1))] for place in range(_PANELS)]


def look(calls: Sequence[AttentionCall], query: Query) -> list[Look]:
    """Return what a query uses in each of some attentions, for `picture` and for numbers beside it."""
    looks = []
    for call in calls:
        tokens = queries_of(call, query) if _mixes(call) else []
        looks.append(Look(call, query, tokens, call.use(tokens) if tokens else None))
    return looks


class _Photo(NamedTuple):
    """What is drawn below everything.

    Attributes:
        pixels: ``[h, w, 3]``, 0 to 1.
        extent: Where its edges are, in pixels of the input.
        size: Height and width of the input.
        own: Width and height of the photo, before it was made smaller to be drawn.
    """

    pixels: np.ndarray
    extent: Extent
    size: tuple[int, int]
    own: tuple[int, int]

    def name(self, query: Query) -> str:
        """Return a query's title, a place in pixels of the photo."""
        if isinstance(query, Region):
            return query.name
        left, right, bottom, top = self.extent
        x, y = (query[0] - left) * self.own[0] / (right - left), (query[1] - top) * self.own[1] / (bottom - top)
        return f"query at {x:.4g}, {y:.4g}"


def _photo(model: nn.Module, x: Tensor, image: Image.Image | None, extent: Extent | None) -> _Photo:
    height, width = x.shape[2:]
    if image is not None:
        image, own = image.convert("RGB"), image.size
        image.thumbnail((_SIDE, _SIDE))
        left, right, bottom, top = extent or (0, width, height, 0)
        return _Photo(np.asarray(image) / 255, (left, right, bottom, top), (height, width), own)
    config = getattr(model, "pretrained_cfg", None) or {}
    channels = x.shape[1]
    mean, std = (
        torch.tensor((tuple(config.get(key) or other) * channels)[:channels])
        for key, other in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD))
    )
    pixels = (x[0].detach().float().cpu() * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    if channels != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1)
    return _Photo(pixels.permute(1, 2, 0).numpy(), (0, width, height, 0), (height, width), (width, height))


def _show(axes: Axes, photo: _Photo) -> None:
    axes.imshow(photo.pixels, extent=photo.extent, aspect="equal")
    axes.set(xticks=[], yticks=[], xlim=(0, photo.size[1]), ylim=(photo.size[0], 0))


def _titles(call: AttentionCall, rest: float = 0.0) -> str:
    lines = [call.name, f"{call.kind}, map {call.map_size[0]}x{call.map_size[1]}"]
    if abs(rest) >= 5e-3:
        lines.append(f"{rest:.0%} on {'prefix tokens' if call.prefix else 'padding or beyond the map'}")
    return "\n".join(lines)


def _add_bar(figure: Figure, axes: Axes, shades: ScalarMappable, label: str, equal: float | None = None) -> None:
    """Add a bar below a panel; of weights in percent, with a line where all would be equal."""
    bar = figure.colorbar(shades, ax=axes, location="bottom", shrink=0.85, pad=0.03, aspect=24)
    bar.set_label(label, fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    least, largest = shades.get_clim()
    if equal is None:
        bar.set_ticks([least, 0, largest] if least < 0 else [0, largest])
        bar.ax.xaxis.set_major_formatter(FormatStrFormatter("%.3g"))
        return
    bar.set_ticks([0, equal, largest] if 0.25 * largest < equal < 0.75 * largest else [0, largest])
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=max(0, 1 - math.floor(math.log10(largest * 100)))))
    bar.ax.axvline(equal, color="white", lw=3)
    bar.ax.axvline(equal, color="black", lw=1)


# A panel of a figure: what draws it.
_Panel = Callable[[Figure, Axes, Legend], None]


def _panels(at: Look, photo: _Photo) -> list[_Panel]:
    """Return the panels of one attention."""
    call = at.call
    if call.kind == "gate":
        return [partial(_draw_gate, call, photo)]
    if call.kind == "channel":
        return [partial(_draw_channels, call)]
    panels: list[_Panel] = [partial(_draw_use, at, photo)]
    if "through" in call.details:
        panels.append(partial(_draw_gathered, at, photo))
    return panels


def _draw_place(query: Query, photo: _Photo, figure: Figure, axes: Axes, legend: Legend) -> None:
    _show(axes, photo)
    mark_query(axes, None, query, legend)
    axes.set_title(photo.name(query), fontsize=8)
    # A bar that isn't seen keeps the panels on one line.
    unseen = figure.colorbar(ScalarMappable(), ax=axes, location="bottom", shrink=0.85, pad=0.03, aspect=24)
    unseen.set_label(" ", fontsize=7.5)
    unseen.ax.tick_params(labelsize=7, colors="none")
    unseen.solids.set_visible(False)
    unseen.outline.set_visible(False)


def _draw_use(at: Look, photo: _Photo, figure: Figure, axes: Axes, legend: Legend) -> None:
    call, query, tokens, use = at
    _show(axes, photo)
    mean, seen = use.weights[0].mean(0).cpu().numpy(), use.seen[0].any(0).cpu().numpy()
    shades = draw_heat(axes, call, mean, seen, symmetric(mean))
    draw_marks(axes, call, tokens, use, legend)
    mark_query(axes, call, query, legend)
    axes.set_title(_titles(call, use.rest[0].mean().item()), fontsize=8)
    label = "weight of a token, mean of heads"
    if call.signed:
        _add_bar(figure, axes, shades, label)
    else:
        _add_bar(figure, axes, shades, f"{label} (line: equal)", 1 / max(1, int(seen.sum())))


def _draw_gathered(at: Look, photo: _Photo, figure: Figure, axes: Axes, legend: Legend) -> None:
    _show(axes, photo)
    shades, count = draw_gathered(axes, at.call, at.tokens, legend)
    axes.set_title(f"{at.call.name}\nwhat the agent that is read most gathers", fontsize=8)
    _add_bar(figure, axes, shades, "weight of a token, mean of heads (line: equal)", 1 / max(1, count))


def _draw_gate(call: AttentionCall, photo: _Photo, figure: Figure, axes: Axes, legend: Legend) -> None:
    gate, values = call.gate[0], gate_on_map(call)
    axes.set_title(f"{_titles(call)}\nfrom {gate.min():.3g} to {gate.max():.3g}", fontsize=8)
    if values.ndim == 1:
        axes.plot(np.sort(values)[::-1], color=BLUE, lw=1.5)
        axes.set(xlim=(0, max(1, len(values) - 1)), ylim=(min(0, values.min()), max(1, values.max())))
        axes.set_xlabel("channels, the most open first", fontsize=7.5)
        axes.tick_params(labelsize=7)
        return
    _show(axes, photo)
    shades = draw_heat(axes, call, values, None, symmetric(values))
    _add_bar(figure, axes, shades, "what the map is multiplied by, mean of channels")


def _draw_channels(call: AttentionCall, figure: Figure, axes: Axes, legend: Legend) -> None:
    matrix = call.matrix()[0].mean(0).cpu().numpy()
    shades = axes.imshow(matrix, cmap=HEAT, vmin=0, vmax=matrix.max(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel("channel that is read", fontsize=7.5)
    axes.set_ylabel("channel that reads", fontsize=7.5)
    axes.set_title(_titles(call), fontsize=8)
    _add_bar(figure, axes, shades, "weight of a channel (line: equal)", 1 / len(matrix))


def _draw_queries(queries: Sequence[Sequence[Look]], photo: _Photo) -> Figure:
    blocks = [
        [partial(_draw_place, looks[0].query, photo), *(panel for at in looks for panel in _panels(at, photo))]
        for looks in queries
    ]
    columns = min(_COLUMNS, len(blocks[0]))
    rows = -(-len(blocks[0]) // columns)
    width = _WIDTH / _COLUMNS
    height = width * photo.size[0] / photo.size[1] + 1.05
    figure = new_figure(width * columns, height * rows * len(blocks) + 0.6)
    grid = figure.subplots(rows * len(blocks), columns, squeeze=False)
    legend: Legend = {}
    for number, panels in enumerate(blocks):
        places = grid[number * rows : (number + 1) * rows].ravel()
        for axes, panel in zip(places, panels, strict=False):
            panel(figure, axes, legend)
        for axes in places[len(panels) :]:
            axes.axis("off")
    _add_legend(figure, legend)
    return figure


def _add_legend(figure: Figure, legend: Legend) -> None:
    words = max(map(len, legend), default=1)
    columns = max(1, min(len(legend), int(figure.get_figwidth() // (0.5 + words * 0.055))))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _draw_heads(at: Look, photo: _Photo) -> Figure:
    call, query, _, use = at
    weights, seen = use.weights[0].cpu().numpy(), use.seen[0].cpu().numpy()
    count = len(weights)
    columns = min(count, _HEADS)
    rows = -(-count // columns)
    width = _WIDTH / _HEADS
    figure = new_figure(max(width * columns, 4), (width * photo.size[0] / photo.size[1] + 0.35) * rows + 1.4)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    limits, legend = symmetric(weights), {}
    for axes in panels[count:]:
        axes.axis("off")
    for head, axes in enumerate(panels[:count]):
        _show(axes, photo)
        shades = draw_heat(axes, call, weights[head], seen[head], limits)
        own = Use(*(part[:, head : head + 1] for part in use))
        draw_seen(axes, call, own, legend)
        mark_query(axes, call, query, legend)
        title = f"head {head}"
        if not seen[head].any():
            title += ": switched off"
        elif not call.signed:
            share = np.clip(weights[head] / max(weights[head].sum(), 1e-12), 1e-12, None)
            bits = -(share * np.log2(share)).sum()
            title += f": {bits:.1f} of {math.log2(max(1, seen[head].sum())):.1f} bits"
        axes.set_title(title, fontsize=8)
    figure.suptitle(_titles(call, use.rest[0].mean().item()).replace("\n", "; "), fontsize=9)
    bar = figure.colorbar(
        shades, ax=list(panels), location="bottom", shrink=0.5, aspect=40, pad=0.02, ticks=MaxNLocator(_TICKS)
    )
    if not call.signed:
        bar.ax.xaxis.set_major_formatter(PercentFormatter(1))
    bar.ax.tick_params(labelsize=7)
    bar.set_label("weight of a token, one scale for all heads", fontsize=8)
    _add_legend(figure, legend)
    return figure


def explain_image(
    model: nn.Module,
    x: Tensor,
    method: str,
    layers: str | Sequence[str] | None = None,
    target: Target = None,
    places: Sequence[Place] = (),
) -> list[Explained]:
    """Return maps by rollout or relevance, of the first layer's tokens, or one by Grad-CAM, of pixels.

    Rollout and relevance begin at each of the places, or once at what the classifier reads if there are none.
    """
    reads: list[tuple[Read, list[Place]]] = [(Pixel(*place), [place]) for place in places] or [("auto", [])]
    if method == "rollout":
        return [
            Explained(method, rollout(model, x, read=read, layers=layers)[0], "rollout, of no class", marks)
            for read, marks in reads
        ]
    with torch.no_grad(), evaluating(model):
        logits = model(x)
    target_logits(model, logits, target)
    index = target_indices(model, logits, target)[0].item()
    words = f"class {index}, probability {logits.float().softmax(1)[0, index]:.1%}"
    if method == "relevance":
        return [
            Explained(
                method, relevance(model, x, index, read, layers, shortcut=False)[0], f"relevance for {words}", marks
            )
            for read, marks in reads
        ]
    layer = layers[0] if isinstance(layers, (list, tuple)) and layers else layers
    words = f"Grad-CAM at {layer or cam_layer(model, x, target)} for {words}"
    return [Explained(method, grad_cam(model, x, target, layer)[0], words, list(places))]


def _draw_maps(maps: Sequence[Explained], photo: _Photo) -> Figure:
    height, width = photo.size
    figure = new_figure(_WIDTH * 2 / 3, (_WIDTH / 3 * height / width + 1.1) * len(maps))
    legend: Legend = {}
    for part, explained in zip(np.ravel(figure.subfigures(len(maps), 1)), maps, strict=True):
        bare, axes = part.subplots(1, 2)
        _show(bare, photo)
        _show(axes, photo)
        look = {"cmap": HEAT, "alpha": ALPHA, "extent": (0, width, height, 0), "interpolation": "nearest"}
        largest = max(explained.values.max().item(), 1e-12)
        shades = axes.imshow(explained.values.cpu().numpy(), vmin=0, vmax=largest, **look)
        for place in explained.marks:
            mark_query(bare, None, place, legend)
            mark_query(axes, None, place, legend)
        words = [explained.words]
        if explained.marks:
            names = "; ".join(photo.name(place) for place in explained.marks)
            words.append(f"marked: {names}" if explained.method == "cam" else f"for the {names}")
        part.suptitle("\n".join(words), fontsize=8)
        bar = part.colorbar(
            shades, ax=[bare, axes], location="bottom", shrink=0.6, aspect=40, ticks=MaxNLocator(_TICKS)
        )
        bar.set_label(_UNITS[explained.method], fontsize=7.5)
        bar.ax.xaxis.set_major_formatter(FormatStrFormatter("%.3g"))
        bar.ax.tick_params(labelsize=7)
    return figure


def frames(
    model: nn.Module,
    x: Tensor,
    path: Sequence[Place],
    count: int = 24,
    layers: str | Sequence[str] | None = None,
    image: Image.Image | None = None,
    extent: Extent | None = None,
    observed: Record | None = None,
) -> Iterator[Image.Image]:
    """Yield pictures of a query that moves along a path, of one recorded forward pass.

    Args:
        model: As in `picture`, like ``x``, ``layers``, ``image``, ``extent`` and ``observed``.
        x: One image.
        path: Corners of the path ``(x, y)``, two at least.
        count: Pictures.
        layers: Attentions.
        image: The photo.
        extent: Where it lies.
        observed: A record.
    """
    if len(path) < 2:
        raise TaskError("a path has two places at least; name more with --at")
    photo = _photo(model, x, image, extent)
    calls = drawable(record_once(model, x, layers) if observed is None else observed, layers)
    corners = np.array(path, dtype=float)
    lengths = np.concatenate([[0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    for length in np.linspace(0, lengths[-1], count):
        place = tuple(float(np.interp(length, lengths, axis)) for axis in corners.T)
        figure = _draw_queries([look(calls, place)], photo)
        figure.canvas.draw()
        yield Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
