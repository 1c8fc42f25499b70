"""Random calls of the operators: every backend that can run gives what the reference does in double precision."""

import math

import torch
from foveate.blocks.aggregated import attend_projected
from foveate.blocks.continuous_bias import bias_axes
from foveate.kernels import (
    depthwise_conv2d,
    multi_scale_deformable_attention,
    na1d,
    na1d_av,
    na1d_qk,
    na2d,
    na2d_av,
    na2d_qk,
    na3d,
    na3d_av,
    na3d_qk,
    point_attention,
    quadtree_scores,
    quadtree_values,
    routed_attention,
)
from foveate.kernels.aggregated import aggregated_attention, aggregated_reference
from foveate.kernels.bilinear import sample_bilinear
from foveate.kernels.pointwise import pointwise
from trial import Trial, Wrong

KINDS = (
    "neighborhood",
    "products",
    "routing",
    "points",
    "deformable",
    "quadtree",
    "window and pooled",
    "aggregated",
    "maps",
)


def run(trial: Trial) -> None:
    for number in trial.numbers():
        torch.manual_seed(trial.draw.getrandbits(32))
        kind = trial.draw.choice((KINDS[0], *KINDS))
        function = globals()[f"_{kind.replace(' ', '_')}"]
        trial.check(kind, number, lambda: function(trial.draw))  # noqa: B023 (called at once)


def _tensor(draw, *shape: int, strange: bool = True) -> torch.Tensor:
    """Return values that lie anyhow in memory."""
    x = torch.randn(shape)
    how = draw.choice(("as it is", "transposed", "cut", "expanded")) if strange else "as it is"
    if how == "transposed":
        first, second = draw.randrange(len(shape)), draw.randrange(len(shape))
        return x.transpose(first, second).contiguous().transpose(first, second)
    if how == "cut":
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : shape[-1]]
    return x[:1].expand(shape) if how == "expanded" and shape[0] else x


def _compare(operator, tensors: list[torch.Tensor], backends, reference="reference", gradients: bool = True) -> None:
    """Compare values and gradients of backends with those of the reference in double precision."""
    call = _differentiate if gradients else _infer
    exact = call(operator, [x.double() if x.is_floating_point() else x for x in tensors], reference)
    for backend in backends:
        try:
            results = call(operator, tensors, backend)
        except ValueError as error:
            if "cannot run here" in str(error):
                continue
            raise
        for place, (result, expected) in enumerate(zip(results, exact, strict=True)):
            if result.shape != expected.shape:
                raise Wrong(f"{backend}: shape {tuple(result.shape)}, not {tuple(expected.shape)}")
            strange = bool((result.isfinite() != expected.isfinite()).any())  # a NaN may stand for an infinity
            difference = (result.double() - expected).nan_to_num(0.0, 0.0, 0.0).abs()
            allowed = 2e-4 * (1 + expected.nan_to_num(0.0, 0.0, 0.0).abs().amax()) if expected.numel() else 1
            if strange or not bool((difference <= allowed).all()):
                fault = "is not finite elsewhere" if strange else f"differs by {difference.max():.1e}"
                raise Wrong(f"{backend}: result {place} {fault}")


def _differentiate(operator, tensors, backend) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    out = operator(*leaves, backend=backend)
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


def _infer(operator, tensors, backend) -> list[torch.Tensor]:
    with torch.no_grad():
        return [operator(*tensors, backend=backend)]


def _windows(draw) -> tuple[list[int], dict]:
    """Draw the sizes of a map, and settings of a neighborhood on it."""
    rank = draw.choice((1, 2, 2, 3))
    sizes = [draw.randint(2, 14 if rank < 3 else 6) for _ in range(rank)]
    kernel, dilation, stride, causal = [], [], [], []
    for size in sizes:
        kernel.append(draw.randint(2, min(size, 9)))
        dilation.append(draw.randint(1, size // kernel[-1]))
        stride.append(draw.randint(1, kernel[-1]))
        causal.append(draw.random() < 0.25)
    names = ("kernel_size", "dilation", "stride", "is_causal")
    return sizes, dict(zip(names, map(tuple, (kernel, dilation, stride, causal)), strict=True))


def _neighborhood(draw) -> None:
    sizes, options = _windows(draw)
    batch, heads, dim = draw.choice((0, 1, 1, 2)), draw.randint(1, 3), draw.randint(1, 19)
    tensors = [_tensor(draw, batch, *sizes, heads, dim) for _ in range(3)]
    backends = (None, "native", "tiled", "boxes", "reference")
    if batch and draw.random() < 0.1:
        backends = tuple(name for name in backends if name != "boxes")  # which can't look at numbers
        tensors[draw.randrange(3)] = (
            tensors[0].clone().index_fill(1, torch.tensor(0), draw.choice((torch.inf, torch.nan)))
        )
    operator = (na1d, na2d, na3d)[len(sizes) - 1]
    _compare(
        lambda q, k, v, backend: operator(q, k, v, backend=backend, **options),
        tensors,
        backends,
    )


def _products(draw) -> None:
    sizes, options = _windows(draw)
    del options["stride"]
    batch, heads, dim, more = draw.choice((0, 1, 1, 2)), draw.randint(1, 3), draw.randint(1, 19), draw.randint(1, 2)
    slots = math.prod(options["kernel_size"])
    scores, sums = ((na1d_qk, na1d_av), (na2d_qk, na2d_av), (na3d_qk, na3d_av))[len(sizes) - 1]
    backends = (None, "native", "tiled", "reference")
    _compare(
        lambda q, k, a, backend: scores(q, k, additional_keys=a, backend=backend, **options),
        [*(_tensor(draw, batch, *sizes, heads, dim) for _ in range(2)), _tensor(draw, batch, more, heads, dim)],
        backends,
    )
    _compare(
        lambda w, v, a, backend: sums(w, v, additional_values=a, backend=backend, **options),
        [
            _tensor(draw, batch, *sizes, heads, slots + more),
            _tensor(draw, batch, *sizes, heads, dim),
            _tensor(draw, batch, more, heads, dim),
        ],
        backends,
    )


def _routing(draw) -> None:
    region = draw.randint(1, 9), draw.randint(1, 9)
    rows, columns = draw.randint(1, 4), draw.randint(1, 4)
    batch, heads, dim = draw.choice((0, 1, 2)), draw.randint(1, 3), draw.choice((1, 3, 8, 16, 32, 48))
    count = rows * columns
    tensors = [_tensor(draw, batch, rows * region[0], columns * region[1], heads, dim) for _ in range(3)]
    routes = torch.stack(
        [torch.randperm(count) for _ in range(batch * count)] or [torch.zeros(count, dtype=torch.long)]
    )
    routes = routes[: batch * count].view(batch, count, count)[..., : draw.randint(1, count)]
    _compare(
        lambda q, k, v, backend: routed_attention(q, k, v, routes, region, backend=backend),
        tensors,
        (None, "native", "chunked", "reference"),
    )


def _points(draw) -> None:
    batch, heads, groups = draw.choice((0, 1, 2)), draw.choice((2, 4)), draw.choice((1, 2))
    height, width, count = draw.randint(1, 9), draw.randint(1, 70), draw.randint(1, 140)
    dim, dim_v, table = draw.randint(1, 33), draw.randint(1, 33), (draw.randint(1, 30), draw.randint(1, 60))
    axes = [torch.linspace(-1, 1, length) if length > 1 else torch.zeros(1) for length in (height, width)]
    tensors = [_tensor(draw, batch, height, width, heads, dim), _tensor(draw, batch, count, heads, dim)]
    tensors += [_tensor(draw, batch, count, heads, dim_v), _tensor(draw, heads, *table)]
    # Without gradients: the slope has kinks wherever a query reads a pixel of the table's.
    places = torch.rand(batch, groups, count, 2) * 2.8 - 1.4, *axes
    _compare(
        lambda *tensors, backend: point_attention(*tensors, *(x.to(tensors[0].dtype) for x in places), backend),
        tensors,
        (None, "native", "rows", "whole"),
        "whole",
        draw.random() < 0.7,
    )


def _deformable(draw) -> None:
    shapes = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 3))]
    batch, queries, heads, dim, points = (
        draw.randint(low, high) for low, high in ((0, 2), (0, 9), (1, 3), (1, 9), (1, 4))
    )
    value = _tensor(draw, batch, sum(height * width for height, width in shapes), heads, dim)
    # The slope changes at cells' centres: kinks are kept away from by a grid of odd parts.
    locations = (torch.randint(-8, 40, (batch, queries, heads, len(shapes), points, 2)) + 0.3517) / 33
    weights = torch.rand(batch, queries, heads, len(shapes), points)
    _compare(
        lambda v, x, w, backend: multi_scale_deformable_attention(v, shapes, x, w, backend=backend),
        [value, locations, weights],
        (None, "native", "bags", "gathers", "reference"),
    )


def _quadtree(draw) -> None:
    batch, heads, dim, parents = draw.choice((0, 1, 2)), draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 9)
    tokens, chosen = draw.randint(1, 9), draw.randint(1, 6)
    index = torch.randint(tokens, (batch, heads, parents, chosen))
    _compare(
        lambda q, k, backend: quadtree_scores(q, k, index, backend=backend),
        [_tensor(draw, batch, heads, parents, 4, dim), _tensor(draw, batch, heads, tokens, 4, dim)],
        (None, "chunked", "reference"),
    )
    _compare(
        lambda w, v, backend: quadtree_values(w, v, index, backend=backend),
        [_tensor(draw, batch, heads, parents, 4, 4 * chosen), _tensor(draw, batch, heads, tokens, 4, dim)],
        (None, "chunked", "reference"),
    )


def _window_and_pooled(draw) -> None:
    window, batch, heads, dim = (
        draw.choice((3, 3, 5, 7)),
        draw.choice((0, 1, 2)),
        draw.randint(1, 3),
        draw.randint(1, 9),
    )
    height, width, pooled = draw.randint(1, 12), draw.randint(1, 12), draw.randint(1, 9)
    tensors = [_tensor(draw, batch, height, width, heads, dim) for _ in range(3)]
    tensors += [_tensor(draw, batch, pooled, heads, dim) for _ in range(2)]
    tensors += [_tensor(draw, heads, window**2), _tensor(draw, heads, height * width, pooled)]
    tensors += [_tensor(draw, batch, height, width, heads, window**2)]

    def operator(query, key, value, pooled_key, pooled_value, local_bias, table, added, *, backend):
        tensors = (query, key, value, pooled_key, pooled_value, local_bias, table)
        if backend == "all scores":
            return aggregated_reference(*tensors, added)
        return aggregated_attention(
            *tensors, lambda x, first, end: x[:, first * width : end * width], added, backend=backend
        )

    for gradients in (True, False):
        _compare(operator, tensors, (None, "native", "tiled", "reference"), "all scores", gradients)


def _aggregated(draw) -> None:
    """Compare the pass in C, which has no gradients, with the operator in double precision."""
    window, ratio = draw.choice((3, 3, 5, 7)), draw.choice((1, 2, 4, 8))
    size = draw.randint(1, 40), draw.randint(1, 70)
    batch, heads, dim = draw.choice((0, 1, 1, 2, 3)), draw.randint(1, 3), draw.choice((1, 3, 8, 17, 24, 32, 40))
    fixed = draw.randint(1, min(size) - 1) if min(size) > 1 and draw.random() < 0.3 else None
    pooled = (fixed, fixed) if fixed else tuple(max(1, length // ratio) for length in size)
    trained = draw.choice((None, None, (16, 16), (8, 20)))
    distances = [len(axis.distances) for axis in bias_axes(size, pooled, ratio, trained)]
    channels, slots = heads * dim, window**2
    tensors = [_tensor(draw, batch, *size, channels), _tensor(draw, batch, *size, 2 * channels)]
    tensors += [_tensor(draw, batch, math.prod(pooled), 2 * channels), _tensor(draw, heads, *distances)]
    tensors += [_tensor(draw, heads, 1, 1), _tensor(draw, heads, 1, dim), _tensor(draw, heads, slots)]
    tensors += [_tensor(draw, heads, dim, slots), _tensor(draw, heads, 1, slots)]
    _compare(
        lambda *tensors, backend: attend_projected(*tensors, pooled, ratio, trained, backend),
        tensors,
        (None, "native", "torch"),
        "torch",
        gradients=False,
    )


def _maps(draw) -> None:
    """Compare depthwise convolutions, linear layers of maps, and readings between pixels."""
    batch, channels, height, width = draw.randint(0, 2), draw.randint(1, 20), draw.randint(1, 14), draw.randint(1, 14)
    kernel, dilation = (draw.choice((1, 3, 5, 7)), draw.choice((1, 3, 5))), (draw.randint(1, 3), draw.randint(1, 3))
    x, gradients = _tensor(draw, batch, channels, height, width), draw.random() < 0.5
    _compare(
        lambda x, w, b, backend: depthwise_conv2d(x, w, b, dilation, backend=backend),
        [x, _tensor(draw, channels, 1, *kernel), _tensor(draw, channels)],
        (None, "interleaved", "channels_last", "convolution"),
        "convolution",
        gradients,
    )
    x, wide, activation = (
        _tensor(draw, batch, height, width, channels),
        draw.randint(1, 20),
        draw.choice((None, "gelu")),
    )
    _compare(
        lambda x, w, b, backend: pointwise(x, w, b, backend, activation),
        [x, _tensor(draw, wide, channels), _tensor(draw, wide)],
        (None, "onednn", "convolution", "linear"),
        "linear",
        gradients,
    )
    # As in `_deformable`, the slope's kinks are kept away from.
    places = [(torch.randint(-2, length + 2, (batch, wide)) * 33 + 12) / 33 for length in (height, width)]
    _compare(
        lambda x, rows, columns, backend: sample_bilinear(x, rows, columns, backend),
        [x, *places],
        (None, "bags", "gather"),
        "gather",
        gradients,
    )
