"""Pictures of attention on the photo: what a query uses in each layer, by kind, and where a class comes from.

Hue means attention only: the photo is grey and light. Nothing is coloured that a query cannot see.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor, nn

from ...blocks.record import spread_rows
from .. import TaskError
from ..seeing.call import AttentionCall, land
from ..seeing.cam import Target, cam_layer, chosen_logits, evaluating, grad_cam, target_indices
from ..seeing.record import Record, record_attention
from ..seeing.rollout import relevance, rollout
from .figures import BLUE, GREEN, GREY, ORANGE, RED, new_figure

METHODS = ("query", "rollout", "relevance", "cam")
# Panels of a model whose maps have one size.
_PANELS = 4
# Of groups of points.
_MARKERS = "os^Dv*Px"
# Of the levels of a tree, the coarsest first.
_LEVELS = (BLUE, ORANGE, RED, "black")

Place = tuple[float, float]


def picture(
    model: nn.Module,
    x: Tensor,
    at: Place | Sequence[Place] | None = None,
    method: str = "query",
    layers: str | Sequence[str] | None = None,
    target: Target = None,
    heads: bool = False,
    image: Image.Image | None = None,
    observed: Record | tuple[Tensor, str] | None = None,
) -> Figure:
    """Draw what a model's attention uses, on the photo as it is.

    ``"query"``: for each query a row of panels, one for each layer. The heat is the mean of the heads' weights on the
    tokens that the query sees, nothing else being coloured; its scale ends at the largest weight, and a tick says what
    equal weights would be. Drawn besides are the outline of what is seen (windows, neighborhoods, stripes), regions
    with their rank (routing), levels (a tree), points with their offsets and sizes (deformable), and the agents that a
    query reads from (agent). The other methods draw one map of the image: `rollout`, `relevance` or `grad_cam`.

    Args:
        model: A model that `record_attention` reads; a classifier for ``"relevance"`` and ``"cam"``.
        x: One image ``[1, C, H, W]``, normalised.
        at: Queries ``(x, y)`` in pixels; the centre by default.
        method: ``"query"``, ``"rollout"``, ``"relevance"`` or ``"cam"``.
        layers: Globs of attentions; by default the last one on each size of map, or four of all depths.
        target: Class that is explained; the likeliest if None.
        heads: Whether to draw each head of the last of the layers, for one query, instead of their mean.
        image: What ``x`` shows, in the same frame; made of ``x`` by the model's mean and standard deviation by default.
        observed: What `observe` returned of the same, where it was asked already.

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
    base = _base(model, x, image)
    if method != "query":
        if observed is None:
            observed = explain_image(model, x, method, layers, target)
        return _draw_map(observed, method, base)
    height, width = x.shape[2:]
    at = [(width / 2, height / 2)] if at is None else at
    places = [tuple(at)] if np.ndim(at) == 1 else [tuple(place) for place in at]
    for place in places:
        if not (0 <= place[0] < width and 0 <= place[1] < height):
            raise TaskError(f"the image is {width}x{height} pixels; {place} is not on it")
    calls = drawable(record_once(model, x, layers) if observed is None else observed, layers)
    return _draw_heads(calls[-1], places[0], base) if heads else _draw_queries(calls, places, base)


def observe(
    model: nn.Module, x: Tensor, method: str, layers: str | Sequence[str] | None = None, target: Target = None
) -> Record | tuple[Tensor, str]:
    """Return what `picture` draws, arguments as there: a record of ``"query"``; of the other methods a map and a title.

    Raises:
        TaskError: If the method is unknown.
    """
    if method not in METHODS:
        raise TaskError(f"method is one of {', '.join(map(repr, METHODS))}; got {method!r}")
    return record_once(model, x, layers) if method == "query" else explain_image(model, x, method, layers, target)


@torch.no_grad()
def record_once(model: nn.Module, x: Tensor, layers: str | Sequence[str] | None = None) -> Record:
    """Record one forward pass in evaluation mode."""
    with evaluating(model), record_attention(model, layers) as record:
        model(x)
    return record


def drawable(record: Record, layers: str | Sequence[str] | None = None) -> list[AttentionCall]:
    """Return the calls that mix positions of maps: all if they were named, else some of all depths.

    Raises:
        TaskError: If there is none.
    """
    calls = [call for call in record.values() if call.kind not in ("gate", "channel") and len(call.map_size) == 2]
    if not calls:
        raise TaskError("what was recorded are gates or channels, which mix no positions; nothing to draw for a query")
    if layers is not None:
        return calls
    # Of several kinds on one map (windows beside points) each; of one size throughout, some of all depths.
    last = list({(call.map_size, call.kind): call for call in calls}.values())
    if len({call.map_size for call in last}) > 1 or len(calls) < _PANELS:
        return last
    return [calls[round(place * (len(calls) - 1) / (_PANELS - 1))] for place in range(_PANELS)]


def _base(model: nn.Module, x: Tensor, image: Image.Image | None) -> np.ndarray:
    """Return the photo in light grey ``[H, W]``, 0 to 1."""
    if image is not None:
        grey = np.asarray(image.convert("L").resize(x.shape[:1:-1]), dtype=float) / 255
    else:
        config = getattr(model, "pretrained_cfg", None) or {}
        channels = x.shape[1]
        mean, std = (
            torch.tensor((tuple(config.get(key) or other) * channels)[:channels])
            for key, other in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))
        )
        pixels = x[0].detach().float().cpu() * std[:, None, None] + mean[:, None, None]
        grey = pixels.mean(0).clamp(0, 1).numpy()
    return 0.35 + 0.6 * grey


def _show(axes: Axes, base: np.ndarray) -> None:
    height, width = base.shape
    axes.imshow(base, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))


def weights_on_map(call: AttentionCall, place: Place) -> tuple[np.ndarray, np.ndarray, float]:
    """Return what a query uses of a map: weights ``[heads, h, w]``, what it can see ``[h, w]``, and the rest.

    The rest is the weight on padding, beyond the map, and on prefix tokens, the mean of the heads.
    """
    query = call.token_at(place)
    tokens, beyond = call.on_tokens([query])
    rows, operator = call.rows([query]), call.operator()
    ones = torch.ones_like(rows.weights) if rows.keys is None else (rows.keys >= 0).float().expand_as(rows.weights)
    seen = land(call.recorded, spread_rows(rows._replace(weights=ones), operator.keys), tokens.shape[-1]) > 0
    maps, seen = (part[0, :, 0, call.prefix :].unflatten(-1, call.map_size).cpu() for part in (tokens, seen))
    rest = beyond[0, :, 0] + tokens[0, :, 0, : call.prefix].sum(-1)
    return maps.numpy(), seen.any(0).numpy(), rest.mean().item()


def _outline(mask: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    """Return the border of cells ``[h, w]`` as line segments ``[n, 2, 2]`` in pixels."""
    padded = np.pad(mask, 1)
    segments = []
    for row, column in zip(*np.nonzero(padded[1:] != padded[:-1]), strict=True):
        segments.append([(column - 1, row), (column, row)])
    for row, column in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1]), strict=True):
        segments.append([(column, row - 1), (column, row)])
    return np.array(segments, dtype=float).reshape(-1, 2, 2) * (step[1], step[0])


def _heat(axes: Axes, call: AttentionCall, weights: np.ndarray, seen: np.ndarray, largest: float):
    rows, columns = call.map_size
    step_y, step_x = call.pixel_steps()
    shown = np.where(seen, weights, np.nan)
    extent = (0, columns * step_x, rows * step_y, 0)
    return axes.imshow(
        shown, cmap="viridis", alpha=0.75, vmin=0, vmax=largest, extent=extent, interpolation="nearest", aspect="equal"
    )


def _mark_query(axes: Axes, call: AttentionCall | None, place: Place) -> None:
    if call is not None:
        step_y, step_x = call.pixel_steps()
        token = call.token_at(place) - call.prefix
        corner = token % call.map_size[1] * step_x, token // call.map_size[1] * step_y
        for colour, width in (("white", 3.0), ("black", 1.5)):
            axes.add_patch(Rectangle(corner, step_x, step_y, fill=False, ec=colour, lw=width, zorder=9))
    axes.plot(*place, marker="+", color="white", markersize=12, markeredgewidth=4, zorder=10)
    axes.plot(*place, marker="+", color=RED, markersize=11, markeredgewidth=2, zorder=10)


Legend = dict[str, Line2D | Patch]


def _add_lines(axes: Axes, segments: np.ndarray, colour: str, width: float) -> None:
    axes.add_collection(LineCollection(segments, colors="white", linewidths=width + 1.4, alpha=0.8, zorder=4))
    axes.add_collection(LineCollection(segments, colors=colour, linewidths=width, zorder=5))


def _draw_seen(axes: Axes, call: AttentionCall, seen: np.ndarray, legend: Legend) -> None:
    if not seen.all():
        _add_lines(axes, _outline(seen, call.pixel_steps()), ORANGE, 1.4)
        legend["what the query can see"] = Line2D([], [], color=ORANGE, lw=1.6)


def _draw_routes(axes: Axes, call: AttentionCall, place: Place, legend: Legend) -> None:
    regions = call.details["regions"]
    (high, wide), columns = regions.region_size, regions.grid[1]
    step_y, step_x = call.pixel_steps()
    token = call.token_at(place)
    row, column = token // call.map_size[1], token % call.map_size[1]
    routed = regions.index[0, row // high * columns + column // wide].tolist()
    for rank, region in enumerate(routed, 1):
        corner = region % columns * wide * step_x, region // columns * high * step_y
        size = wide * step_x, high * step_y
        axes.add_patch(Rectangle(corner, *size, fill=False, ec="white", lw=2.8, zorder=4))
        axes.add_patch(Rectangle(corner, *size, fill=False, ec=ORANGE, lw=1.5, zorder=5))
        if len(routed) <= 16:
            box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
            axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, rank, fontsize=7, ha="center", va="center",
                      bbox=box, zorder=6, clip_on=True)  # fmt: skip
    own = column // wide * wide * step_x, row // high * high * step_y
    axes.add_patch(Rectangle(own, wide * step_x, high * step_y, fill=False, ec=BLUE, lw=2, ls="--", zorder=7))
    legend["routed regions, numbered by rank"] = Line2D([], [], color=ORANGE, lw=1.6)
    legend["the query's region"] = Line2D([], [], color=BLUE, lw=2, ls="--")


def _draw_levels(axes: Axes, call: AttentionCall, place: Place, legend: Legend) -> None:
    routes, grids = call.details["routes"], call.details["grids"]
    step_y, step_x = call.pixel_steps()
    token = call.token_at(place)
    row, column = token // call.map_size[1], token % call.map_size[1]
    for level in reversed(range(len(routes))):
        grid = grids[level]
        tokens = routes[level].tokens[0, :, row >> level, column >> level].flatten()
        mask = np.zeros(grid[0] * grid[1], dtype=bool)
        mask[tokens.cpu().numpy()] = True
        depth = len(routes) - 1 - level
        colour = _LEVELS[depth % len(_LEVELS)]
        segments = _outline(mask.reshape(grid), (step_y << level, step_x << level))
        _add_lines(axes, segments, colour, 2.2 - 0.5 * depth)
        legend[f"level {depth + 1} of the tree, all heads" + " (everything)" * (depth == 0)] = Line2D(
            [], [], color=colour, lw=2.2 - 0.5 * depth
        )


def _draw_points(axes: Axes, call: AttentionCall, place: Place, legend: Legend) -> None:
    points, references = call.details["points"][0].cpu(), call.details["references"].cpu()
    groups, steps = len(points), torch.tensor(call.pixel_steps()[::-1])
    weights = call.rows([call.token_at(place)]).weights[0, :, 0].unflatten(0, (groups, -1)).mean(1).cpu()
    largest = weights.max()
    starts = ((references.flatten(0, 1) + 0.5) * steps).numpy()
    axes.plot(*starts.T, ls="", marker="o", mfc="none", mec=GREY, markersize=2.5, mew=0.6, zorder=3)
    for group in range(groups):
        ends = ((points[group].flatten(0, 1) + 0.5) * steps).numpy()
        heaviest = weights[group].topk(len(ends) if len(ends) * groups <= 100 else 10).indices.numpy()
        offsets = np.stack([starts[heaviest], ends[heaviest]], 1)
        axes.add_collection(LineCollection(offsets, colors="black", linewidths=0.5, alpha=0.7, zorder=3))
        axes.scatter(
            *ends.T,
            s=(min(70, 9000 / weights.numel()) * weights[group] / largest).numpy(),
            marker=_MARKERS[group % len(_MARKERS)],
            facecolor=ORANGE,
            edgecolor="black",
            linewidth=0.4,
            zorder=6,
        )
    legend["sampled points, area by weight"] = Line2D([], [], ls="", marker="o", mfc=ORANGE, mec="black", markersize=7)
    legend["where they started"] = Line2D([], [], ls="", marker="o", mfc="none", mec=GREY, markersize=4)
    if groups > 1:
        legend["a shape for each group of heads"] = Line2D([], [], ls="", marker="s", mfc=ORANGE, mec="black")


def _draw_agents(axes: Axes, call: AttentionCall, place: Place, legend: Legend) -> None:
    through, (down, across) = call.details["through"], call.details["agents"]
    if through.windows is not None:
        return
    height, width = call.map_size[0] * call.pixel_steps()[0], call.map_size[1] * call.pixel_steps()[1]
    weights = through.read[0, :, call.token_at(place)].mean(0).cpu()
    rows, columns = ((torch.arange(count) + 0.5) / count for count in (down, across))
    places = torch.cartesian_prod(rows * height, columns * width).numpy()
    axes.scatter(
        places[:, 1],
        places[:, 0],
        s=(90 * weights / weights.max()).numpy(),
        facecolor=ORANGE,
        edgecolor="black",
        linewidth=0.5,
        zorder=6,
    )
    heaviest = weights.argmax().item()
    axes.plot(*places[heaviest, ::-1], marker="o", markersize=14, mfc="none", mec=GREEN, mew=2.5, zorder=7)
    gathered = through.gathered[0, :, heaviest].mean(0)[call.prefix :].view(call.map_size).cpu().numpy()
    # The fewest tokens that hold half of what the agent gathers.
    order = np.sort(gathered.ravel())[::-1]
    half = order[np.searchsorted(order.cumsum(), order.sum() / 2)]
    _add_lines(axes, _outline(gathered >= half, call.pixel_steps()), GREEN, 1.2)
    legend["agents, area by what the query reads"] = Line2D([], [], ls="", marker="o", mfc=ORANGE, mec="black")
    legend["the agent read most, and half of what it gathers"] = Line2D([], [], color=GREEN, lw=1.6)


def _draw_marks(axes: Axes, call: AttentionCall, place: Place, seen: np.ndarray, legend: Legend) -> None:
    # What an attention tells of its making says what there is to draw.
    if "regions" in call.details:
        _draw_routes(axes, call, place, legend)
    elif "routes" in call.details:
        _draw_levels(axes, call, place, legend)
    elif "points" in call.details:
        _draw_points(axes, call, place, legend)
    elif "through" in call.details:
        _draw_agents(axes, call, place, legend)
        _draw_seen(axes, call, seen, legend)
    else:
        _draw_seen(axes, call, seen, legend)


def _titles(call: AttentionCall, rest: float) -> str:
    lines = [call.name, f"{call.kind}, map {call.map_size[0]}x{call.map_size[1]}"]
    if abs(rest) > 5e-4:
        lines.append(f"{rest:.0%} on {'prefix tokens' if call.prefix else 'padding or beyond the map'}")
    return "\n".join(lines)


def _add_bar(figure: Figure, axes: Axes, shades, seen: np.ndarray, label: str) -> None:
    bar = figure.colorbar(shades, ax=axes, location="bottom", shrink=0.85, pad=0.03)
    largest, equal = shades.get_clim()[1], 1 / max(1, int(seen.sum()))
    bar.set_ticks([0, largest])
    if 0.12 * largest < equal < 0.88 * largest:
        bar.set_ticks([0, equal, largest])
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=max(0, 1 - math.floor(math.log10(largest * 100)))))
    bar.ax.axvline(equal, color="white", lw=1.5)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _draw_queries(calls: Sequence[AttentionCall], places: Sequence[Place], base: np.ndarray) -> Figure:
    height, width = base.shape
    figure = new_figure(2.9 * (len(calls) + 1), (2.9 * height / width + 1.25) * len(places) + 0.6)
    rows = figure.subplots(len(places), len(calls) + 1, squeeze=False)
    legend: Legend = {}
    for place, panels in zip(places, rows, strict=True):
        _show(panels[0], base)
        _mark_query(panels[0], None, place)
        panels[0].set_title(f"query at {place[0]:g}, {place[1]:g}", fontsize=9)
        # A bar that isn't seen keeps the panels on one line.
        unseen = figure.colorbar(ScalarMappable(), ax=panels[0], location="bottom", shrink=0.85, pad=0.03)
        unseen.solids.set_visible(False)
        unseen.ax.axis("off")
        for axes, call in zip(panels[1:], calls, strict=True):
            _show(axes, base)
            weights, seen, rest = weights_on_map(call, place)
            mean = weights.mean(0)
            shades = _heat(axes, call, mean, seen, max(mean.max(), 1e-12))
            _draw_marks(axes, call, place, seen, legend)
            _mark_query(axes, call, place)
            axes.set_title(_titles(call, rest), fontsize=9)
            _add_bar(figure, axes, shades, seen, "weight of a token, mean of heads (line: equal)")
    legend["the query and its token"] = Line2D([], [], ls="", marker="+", color=RED, markersize=9, mew=2)
    columns = max(1, min(len(legend), int(figure.get_figwidth() // 2.6)))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def _draw_heads(call: AttentionCall, place: Place, base: np.ndarray) -> Figure:
    weights, seen, rest = weights_on_map(call, place)
    count, (height, width) = len(weights), base.shape
    columns = min(count, 6)
    rows = -(-count // columns)
    figure = new_figure(2.4 * columns + 0.6, (2.4 * height / width + 0.5) * rows + 1.0)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    largest, legend = max(weights.max(), 1e-12), {}
    possible = math.log2(max(1, seen.sum()))
    for axes in panels[count:]:
        axes.axis("off")
    for head, axes in enumerate(panels[:count]):
        _show(axes, base)
        shades = _heat(axes, call, weights[head], seen, largest)
        _draw_seen(axes, call, seen, legend)
        _mark_query(axes, call, place)
        share = np.clip(weights[head] / max(weights[head].sum(), 1e-12), 1e-12, None)
        axes.set_title(f"head {head}: {-(share * np.log2(share)).sum():.1f} of {possible:.1f} bits", fontsize=8)
    figure.suptitle(_titles(call, rest).replace("\n", "; "), fontsize=10)
    bar = figure.colorbar(shades, ax=list(panels), location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1))
    bar.set_label("weight of a token, one scale for all heads", fontsize=8)
    return figure


def explain_image(
    model: nn.Module, x: Tensor, method: str, layers: str | Sequence[str] | None = None, target: Target = None
) -> tuple[Tensor, str]:
    """Return a map by rollout or relevance, of the first layer's tokens, or by Grad-CAM, of pixels; and its title."""
    if method == "rollout":
        return rollout(model, x, layers=layers)[0], "rollout, of no class"
    with torch.no_grad(), evaluating(model):
        logits = model(x)
    chosen_logits(model, logits, target)
    index = target_indices(model, logits, target)[0].item()
    words = f"class {index}, probability {logits.float().softmax(1)[0, index]:.1%}"
    if method == "relevance":
        return relevance(model, x, target, layers=layers)[0], f"relevance for {words}"
    layer = layers[0] if isinstance(layers, (list, tuple)) and layers else layers
    return grad_cam(model, x, target, layer), f"Grad-CAM at {layer or cam_layer(model, x, target)} for {words}"


def _draw_map(observed: tuple[Tensor, str], method: str, base: np.ndarray) -> Figure:
    values, words = observed
    figure = new_figure(6.4, 6.4 / 2 * base.shape[0] / base.shape[1] + 1.2)
    photo, axes = figure.subplots(1, 2)
    _show(photo, base)
    _show(axes, base)
    height, width = base.shape
    extent = (0, width, height, 0)
    largest = max(values.max().item(), 1e-12)
    shades = axes.imshow(
        values.cpu().numpy(), cmap="viridis", alpha=0.75, vmin=0, vmax=largest, extent=extent, interpolation="nearest"
    )
    figure.suptitle(words, fontsize=9)
    bar = figure.colorbar(shades, ax=[photo, axes], location="bottom", shrink=0.6, aspect=40)
    bar.set_label("share of a token" if method != "cam" else "of the largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def frames(
    model: nn.Module,
    x: Tensor,
    path: Sequence[Place],
    count: int = 24,
    layers: str | Sequence[str] | None = None,
    image: Image.Image | None = None,
    observed: Record | None = None,
) -> Iterator[Image.Image]:
    """Yield pictures of a query that moves along a path, of one recorded forward pass.

    Args:
        model: As in `picture`, like ``x``, ``layers`` and ``image``.
        x: One image.
        path: Corners of the path ``(x, y)``, two at least.
        count: Pictures.
        layers: Attentions.
        image: What ``x`` shows.
        observed: A record of the same, where there is one already.
    """
    if len(path) < 2:
        raise TaskError("a path has two places at least; name more with --at")
    base = _base(model, x, image)
    calls = drawable(record_once(model, x, layers) if observed is None else observed, layers)
    corners = np.array(path, dtype=float)
    lengths = np.concatenate([[0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    for length in np.linspace(0, lengths[-1], count):
        place = tuple(float(np.interp(length, lengths, axis)) for axis in corners.T)
        figure = _draw_queries(calls, [place], base)
        figure.canvas.draw()
        yield Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
