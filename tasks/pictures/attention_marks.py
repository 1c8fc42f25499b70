"""What a picture of attention shows on one panel: the heat of its weights, and marks that each kind of attention has.

Every function adds to a panel and, for marks, to the legend of the figure.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from ..seeing.call import AttentionCall, Use
from .figures import BLUE, GREEN, ORANGE, RED

HEAT = "viridis"
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "white", ORANGE])
# Of what lies on the photo, which is seen through it.
ALPHA = 0.65
# Of groups of points; all of them can be filled.
_MARKERS = "os^Dv*PX<>hp8dH"
# Of the levels of a tree, the coarsest first.
_LEVELS = (BLUE, ORANGE, RED, "black")
# Points that are drawn large, with the way that they were moved; the others are dots.
_POINTS = 49
# Regions that are numbered.
_RANKS = 16

Place = tuple[float, float]
Legend = dict[str, Line2D | Patch]


class Region(NamedTuple):
    """A part of an image, all of whose positions are asked at once.

    Attributes:
        mask: Which pixels of the model's input it is, ``[H, W]``, bool.
        name: What it is called on the picture.
    """

    mask: np.ndarray
    name: str


Query = Place | Region


def queries_of(call: AttentionCall, query: Query) -> list[int]:
    """Return the queries at a place, or within a region: at least half of their pixels, or at its middle."""
    if not isinstance(query, Region):
        return [call.token_at(query)]
    (step_y, step_x), (rows, columns) = call.pixel_steps(), call.map_size
    height, width = query.mask.shape
    padded = np.zeros((rows * step_y, columns * step_x))
    padded[:height, :width] = query.mask[: rows * step_y, : columns * step_x]
    shares = padded.reshape(rows, step_y, columns, step_x).mean((1, 3))
    tokens = np.flatnonzero(shares >= 0.5)
    if not len(tokens):
        tokens = [shares.argmax()]
    return [call.prefix + int(token) for token in tokens]


def draw_heat(
    axes: Axes, call: AttentionCall, weights: np.ndarray, seen: np.ndarray | None, limits: tuple[float, float]
) -> ScalarMappable:
    """Colour the tokens that are seen, all if None, by their numbers ``[h, w]``; the rest of the photo stays bare."""
    rows, columns = call.map_size
    step_y, step_x = call.pixel_steps()
    shown = weights if seen is None else np.where(seen, weights, np.nan)
    extent = (0, columns * step_x, rows * step_y, 0)
    colours = SIGNED if limits[0] < 0 else HEAT
    look = {"cmap": colours, "alpha": ALPHA, "extent": extent, "interpolation": "nearest", "aspect": "equal"}
    return axes.imshow(shown, vmin=limits[0], vmax=limits[1], **look)


def mark_query(axes: Axes, call: AttentionCall | None, query: Query, legend: Legend) -> None:
    """Mark a place by a cross, with the outline of its token on a map; a region by its outline."""
    if isinstance(query, Region):
        height, width = query.mask.shape
        extent = (0, width, 0, height)
        for colour, thickness in (("white", 3.0), (RED, 1.5)):
            padded = np.pad(query.mask, 1).astype(float)
            x, y = np.arange(-1, width + 1) + 0.5, np.arange(-1, height + 1) + 0.5
            axes.contour(x, y, padded, [0.5], colors=colour, linewidths=thickness, zorder=9, extent=extent)
        legend["what is asked about"] = Line2D([], [], color=RED, lw=1.6)
        return
    if call is not None:
        step_y, step_x = call.pixel_steps()
        token = call.token_at(query) - call.prefix
        corner = token % call.map_size[1] * step_x, token // call.map_size[1] * step_y
        for colour, width in (("white", 3.0), ("black", 1.5)):
            axes.add_patch(Rectangle(corner, step_x, step_y, fill=False, ec=colour, lw=width, zorder=9))
    axes.plot(*query, marker="+", color="white", markersize=10, markeredgewidth=3.5, zorder=10)
    axes.plot(*query, marker="+", color=RED, markersize=9, markeredgewidth=1.8, zorder=10)
    legend["the query and its token"] = Line2D([], [], ls="", marker="+", color=RED, markersize=9, mew=2)


def draw_marks(axes: Axes, call: AttentionCall, queries: list[int], use: Use, legend: Legend) -> None:
    """Draw what an attention tells of its making: regions, levels, points, agents; else the outline of what is seen."""
    if "regions" in call.details:
        _draw_routes(axes, call, queries, use, legend)
    elif "routes" in call.details:
        _draw_levels(axes, call, queries, legend)
    elif "points" in call.details:
        _draw_points(axes, call, queries, legend)
    else:
        if "through" in call.details:
            _draw_agents(axes, call, queries, legend)
        draw_seen(axes, call, use, legend)


def _outline(mask: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    """Return the border of cells ``[h, w]`` as line segments ``[n, 2, 2]`` in pixels."""
    padded = np.pad(mask, 1)
    segments = []
    for row, column in zip(*np.nonzero(padded[1:] != padded[:-1]), strict=True):
        segments.append([(column - 1, row), (column, row)])
    for row, column in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1]), strict=True):
        segments.append([(column, row - 1), (column, row)])
    return np.array(segments, dtype=float).reshape(-1, 2, 2) * (step[1], step[0])


def _add_lines(axes: Axes, segments: np.ndarray, colour: str, width: float, style: str = "-") -> None:
    axes.add_collection(LineCollection(segments, colors="white", linewidths=width + 1.4, alpha=0.8, zorder=4))
    axes.add_collection(LineCollection(segments, colors=colour, linewidths=width, linestyles=style, zorder=5))


def draw_seen(axes: Axes, call: AttentionCall, use: Use, legend: Legend) -> None:
    """Outline what is seen one by one: once for all heads, or for each group of heads that see the same."""
    whole = use.whole[0].cpu().numpy()
    sets = [mask for mask in np.unique(whole, axis=0) if mask.any() and not mask.all()]
    pooled = bool((use.seen & ~use.whole).any())
    everything = bool(whole.all((1, 2)).any())
    if len(sets) > 2:
        sets = [whole.any(0)]
    for number, mask in enumerate(sets):
        colour, style = ((ORANGE, "-"), (BLUE, (0, (4, 2))))[number]
        _add_lines(axes, _outline(mask, call.pixel_steps()), colour, 1.5, style)
        what = "seen token by token, the rest pooled" if pooled else "what the query can see"
        if len(sets) > 1 or (pooled and not whole.any((1, 2)).all()):
            what = f"{what}, by {('some', 'the other' if not everything else 'other')[number]} heads"
        elif everything:
            what = "what some heads can see; the others see everything"
        legend[what] = Line2D([], [], color=colour, lw=1.6, ls=style)


def _draw_routes(axes: Axes, call: AttentionCall, queries: list[int], use: Use, legend: Legend) -> None:
    regions = call.details["regions"]
    (high, wide), columns = regions.region_size, regions.grid[1]
    step_y, step_x = call.pixel_steps()
    if len(queries) > 1:
        _add_lines(axes, _outline(use.seen[0].any(0).cpu().numpy(), call.pixel_steps()), ORANGE, 1.5)
        legend["regions that any of them is routed to"] = Line2D([], [], color=ORANGE, lw=1.6)
        return
    row, column = queries[0] // call.map_size[1], queries[0] % call.map_size[1]
    routed = regions.index[0, row // high * columns + column // wide].tolist()
    for rank, region in enumerate(routed, 1):
        corner = region % columns * wide * step_x, region // columns * high * step_y
        size = wide * step_x, high * step_y
        axes.add_patch(Rectangle(corner, *size, fill=False, ec="white", lw=2.8, zorder=4))
        axes.add_patch(Rectangle(corner, *size, fill=False, ec=ORANGE, lw=1.5, zorder=5))
        if len(routed) <= _RANKS:
            box = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.8}
            centre = corner[0] + size[0] / 2, corner[1] + size[1] / 2
            axes.text(*centre, rank, fontsize=7, ha="center", va="center", bbox=box, zorder=6, clip_on=True)
    own = column // wide * wide * step_x, row // high * high * step_y
    for colour, style, width in (("white", "-", 3.2), (BLUE, "--", 1.8)):
        axes.add_patch(
            Rectangle(own, wide * step_x, high * step_y, fill=False, ec=colour, lw=width, ls=style, zorder=7)
        )
    legend["routed regions, numbered by rank"] = Line2D([], [], color=ORANGE, lw=1.6)
    legend["the query's region"] = Line2D([], [], color=BLUE, lw=2, ls="--")


def _draw_levels(axes: Axes, call: AttentionCall, queries: list[int], legend: Legend) -> None:
    routes, grids = call.details["routes"], call.details["grids"]
    step_y, step_x = call.pixel_steps()
    places = torch.tensor(queries)
    rows, columns = places // call.map_size[1], places % call.map_size[1]
    # The coarsest level is all of the map.
    for level in reversed(range(len(routes) - 1)):
        grid = grids[level]
        tokens = routes[level].tokens[0, :, rows >> level, columns >> level].flatten()
        mask = np.zeros(grid[0] * grid[1], dtype=bool)
        mask[tokens.cpu().numpy()] = True
        depth = len(routes) - 1 - level
        colour = _LEVELS[depth % len(_LEVELS)]
        width = 2.2 - 0.4 * depth
        _add_lines(axes, _outline(mask.reshape(grid), (step_y << level, step_x << level)), colour, width)
        legend[f"level {depth + 1} of the tree, of any head (level 1: everything)"] = Line2D(
            [], [], color=colour, lw=width
        )


def _draw_points(axes: Axes, call: AttentionCall, queries: list[int], legend: Legend) -> None:
    points, references = call.details["points"][0].cpu(), call.details["references"].cpu()
    groups, steps = len(points), torch.tensor(call.pixel_steps()[::-1])
    weights = call.rows(queries).weights[0].mean(1).unflatten(0, (groups, -1)).mean(1).cpu()
    starts = ((references.flatten(0, 1) + 0.5) * steps).numpy()
    ends = ((points.flatten(1, 2) + 0.5) * steps).numpy()
    heaviest = weights.flatten().topk(min(_POINTS, weights.numel())).indices.numpy()
    axes.plot(*ends.reshape(-1, 2).T, ls="", marker=".", mfc="black", mec="white", markersize=3, mew=0.4, zorder=3)
    for group in range(groups):
        own = heaviest[heaviest // weights.shape[1] == group] % weights.shape[1]
        if not len(own):
            continue
        axes.plot(*starts[own].T, ls="", marker="o", mfc="white", mec="black", markersize=2.8, mew=0.6, zorder=4)
        lines = np.stack([starts[own], ends[group, own]], 1)
        for colour, width in (("white", 1.6), ("black", 0.7)):
            axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, zorder=4))
        axes.scatter(
            *ends[group, own].T,
            s=(60 * weights[group, own] / weights.max()).numpy(),
            marker=_MARKERS[group % len(_MARKERS)],
            facecolor=ORANGE,
            edgecolor="black",
            linewidth=0.6,
            zorder=6,
        )
    # One entry for all panels, of one group or several.
    what = f"sampled points, {_POINTS} at most, area by weight, a shape for each group of heads"
    legend[what] = Line2D([], [], ls="", marker="o", mfc=ORANGE, mec="black", markersize=7)
    legend["where they started"] = Line2D([], [], color="black", lw=0.8, marker="o", mfc="white", markersize=3.5)
    if weights.numel() > _POINTS:
        legend["other sampled points"] = Line2D([], [], ls="", marker=".", mfc="black", mec="white", markersize=5)


def _agents_of(call: AttentionCall, queries: list[int]) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Return where the agents of the first query are in pixels ``[n, 2]``, what is read from each, and their window."""
    through, (down, across) = call.details["through"], call.details["agents"]
    step_y, step_x = call.pixel_steps()
    first, (height, width) = (0, 0), call.map_size
    if through.windows is None:
        read = through.read[0, :, queries].mean((0, 1))
        tokens = np.arange(height * width)
    else:
        window = through.windows.window[queries[0]]
        own = [query for query in queries if through.windows.window[query] == window]
        read = through.read[0, window, :, through.windows.place[own]].mean((0, 1))
        tokens = through.windows.tokens[window].cpu().numpy()
        tokens = tokens[tokens < height * width]
        rows, columns = tokens // width, tokens % width
        first, (height, width) = (rows.min(), columns.min()), (np.ptp(rows) + 1, np.ptp(columns) + 1)
    rows, columns = ((np.arange(count) + 0.5) / count for count in (down, across))
    rows, columns = (first[0] + rows * height) * step_y, (first[1] + columns * width) * step_x
    return np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2), read.cpu(), tokens


def _draw_agents(axes: Axes, call: AttentionCall, queries: list[int], legend: Legend) -> None:
    places, read, _ = _agents_of(call, queries)
    look = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.8, "zorder": 6}
    axes.scatter(*places.T, s=(70 * read / read.max()).numpy(), **look)
    _ring(axes, places[read.argmax().item()], legend)
    legend["agents, area by what the query reads"] = Line2D([], [], ls="", marker="o", mfc="white", mec="black")


def _ring(axes: Axes, place: np.ndarray, legend: Legend) -> None:
    axes.plot(*place, marker="o", markersize=13, mfc="none", mec="white", mew=3.6, zorder=7)
    axes.plot(*place, marker="o", markersize=13, mfc="none", mec=GREEN, mew=2.2, zorder=7)
    legend["the agent that it reads most"] = Line2D(
        [], [], ls="", marker="o", mfc="none", mec=GREEN, mew=2.2, markersize=9
    )


def draw_gathered(axes: Axes, call: AttentionCall, queries: list[int], legend: Legend) -> tuple[ScalarMappable, int]:
    """Draw what the agent gathers that queries read most; return the shades, and how many tokens it sees."""
    through = call.details["through"]
    places, read, tokens = _agents_of(call, queries)
    agent = read.argmax().item()
    if through.windows is None:
        gathered = through.gathered[0, :, agent].mean(0)[call.prefix :]
    else:
        window = through.windows.window[queries[0]]
        gathered = through.gathered[0, window, :, agent].mean(0)
        gathered = gathered[through.windows.tokens[window] < call.map_size[0] * call.map_size[1]]
    laid = np.full(call.map_size[0] * call.map_size[1], np.nan)
    laid[tokens] = gathered.cpu().numpy()
    laid = laid.reshape(call.map_size)
    shades = draw_heat(axes, call, laid, None, (0, np.nanmax(laid)))
    _ring(axes, places[agent], legend)
    return shades, len(tokens)


def gate_on_map(call: AttentionCall) -> np.ndarray:
    """Return the mean of a gate's channels ``[h, w]``, or for a gate of channels alone each of them ``[C]``."""
    gate = call.gate[0].float().cpu()
    if max(gate.shape[1:]) == 1:
        return gate.flatten().numpy()
    return gate.mean(0).expand(call.map_size).numpy()


def symmetric(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the limits of a scale: from 0, or symmetric about it where there are values below."""
    largest = max(float(np.abs(values).max()), 1e-12)
    return (-largest if np.min(values) < 0 else 0.0), largest
