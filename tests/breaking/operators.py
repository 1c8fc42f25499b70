"""Random calls of the operators: every backend that can run gives what the reference does in double precision."""

import functools
import math
import sys
from unittest import mock

import torch
import torch.nn.functional as F
from foveate.blocks.aggregated import attend_projected
from foveate.blocks.continuous_bias import bias_axes
from foveate.kernels import (
    depthwise_conv2d,
    gelu_linear,
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
    quadtree_level,
    quadtree_scores,
    quadtree_values,
    routed_attention,
    token_attention,
    window_attention,
)
from foveate.kernels.aggregated import aggregated_attention, aggregated_reference
from foveate.kernels.bilinear import sample_bilinear
from foveate.kernels.gelu_linear import _Recomputed
from foveate.kernels.pointwise import pointwise
from trial import Trial, Wrong

KINDS = (
    "neighborhood",
    "products",
    "routing",
    "points",
    "tokens",
    "deformable",
    "quadtree",
    "level",
    "window and pooled",
    "aggregated",
    "maps",
    "misfits",
)
# Of values and gradients, beside the largest.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def run(trial: Trial) -> None:
    for number in trial.numbers():
        torch.manual_seed(trial.draw.getrandbits(32))
        kind = trial.draw.choice((KINDS[0], *KINDS))
        function = globals()[f"_{kind.replace(' ', '_')}"]
        # What the operators make themselves must be of their tensors' dtype, whatever torch's default is.
        dtype = trial.draw.choice((*[torch.float32] * 3, torch.float64, torch.float16, torch.bfloat16))
        torch.set_default_dtype(dtype)
        try:
            trial.check(kind, number, lambda: function(trial.draw))  # noqa: B023 (called at once)
        finally:
            torch.set_default_dtype(torch.float32)


@functools.cache
def _rows_leak() -> bool:
    """Return whether torch's own products of bfloat16 let a row's NaN into the next, as on CPUs with AMX."""
    rows, weight = torch.ones(17, 31, dtype=torch.bfloat16), torch.ones(17, 31, dtype=torch.bfloat16)
    rows[1] = torch.nan
    return int(F.linear(rows, weight).isnan().any(-1).sum()) > 1


def _tensor(draw, *shape: int, strange: bool = True, products: bool = False) -> torch.Tensor:
    """Return values that lie anyhow in memory; those for torch's own ``products`` not beside NaN that it would read."""
    x = torch.randn(shape)
    how = draw.choice(("as it is", "transposed", "cut", "expanded")) if strange else "as it is"
    if how == "transposed":
        first, second = draw.randrange(len(shape)), draw.randrange(len(shape))
        return x.transpose(first, second).contiguous().transpose(first, second)
    if how == "cut":
        beside = 0 if products and x.dtype == torch.bfloat16 and _rows_leak() else torch.nan
        return torch.cat([x, torch.full_like(x, beside)], -1)[..., : shape[-1]]
    return x[:1].expand(shape) if how == "expanded" and shape[0] else x


def _spoil(draw, tensors: list[torch.Tensor]) -> None:
    """Put what is not finite into a line of one of some maps, which not every query sees."""
    place = draw.randrange(len(tensors))
    line = torch.tensor(draw.randrange(tensors[place].shape[1]))
    tensors[place] = tensors[place].clone().index_fill(1, line, draw.choice((torch.inf, torch.nan)))


def _compare(operator, tensors: list[torch.Tensor], backends, reference="reference", gradients: bool = True) -> None:
    """Compare values and gradients of backends, at times twice, with those of the reference in double precision."""
    # What is not finite stays apart in results and gradients, not in gradients of gradients.
    twice = gradients and int(torch.randint(4, ())) == 0 and all(bool(x.isfinite().all()) for x in tensors)
    call = functools.partial(_differentiate, twice=twice) if gradients else _infer
    exact = call(operator, [x.double() if x.is_floating_point() else x for x in tensors], reference)
    for backend in backends:
        try:
            results = call(operator, tensors, backend)
        except ValueError as error:
            if "cannot run here" in str(error):
                continue
            raise
        except RuntimeError as error:
            if twice and backend is not None and "derivative" in str(error):
                continue
            raise
        for place, (result, expected) in enumerate(zip(results, exact, strict=True)):
            if result.shape != expected.shape:
                raise Wrong(f"{backend}: shape {tuple(result.shape)}, not {tuple(expected.shape)}")
            strange = bool((result.isfinite() != expected.isfinite()).any())  # a NaN may stand for an infinity
            difference = (result.double() - expected).nan_to_num(0.0, 0.0, 0.0).abs()
            largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().amax() if expected.numel() else 0
            allowed = _TOLERANCES[tensors[0].dtype] * (1 + largest)
            if strange or not bool((difference <= allowed).all()):
                fault = "is not finite elsewhere" if strange else f"differs by {difference.max():.1e}"
                raise Wrong(f"{backend}: result {place} {fault}")


def _differentiate(operator, tensors, backend, twice: bool) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    wanted = [x for x in leaves if x.requires_grad]
    if twice:  # as where an operand is computed from another: the way between them must count once
        nothing = _weighted(leaves[0].nan_to_num(0.0, 0.0, 0.0)) / max(leaves[0].numel(), 1)
        nothing = nothing - nothing.detach()
        operands = [leaves[0], *(x + nothing.to(x.dtype) if x.requires_grad else x for x in leaves[1:])]
    else:
        operands = leaves
    out = operator(*operands, backend=backend)
    results = [out, *torch.autograd.grad(_weighted(out), wanted, create_graph=twice)]
    if twice:
        total = sum(map(_weighted, results))  # the output too, since gradients may be constant
        results += torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in results]


def _weighted(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape).to(x.dtype)).sum()


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
    batch, heads, dim = draw.choice((0, 1, 1, 2)), draw.randint(1, 3), draw.randint(0, 19)
    tensors = [_tensor(draw, batch, *sizes, heads, dim) for _ in range(3)]
    backends = (None, "native", "tiled", "boxes", "reference")
    if batch and draw.random() < 0.1:
        backends = tuple(name for name in backends if name != "boxes")  # which can't look at numbers
        _spoil(draw, tensors)
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
    batch, heads, dim = draw.choice((0, 1, 2)), draw.randint(1, 3), draw.choice((0, 1, 3, 8, 16, 16, 32, 48))
    count = rows * columns
    tensors = [_tensor(draw, batch, rows * region[0], columns * region[1], heads, dim) for _ in range(3)]
    routes = torch.stack(
        [torch.randperm(count) for _ in range(batch * count)] or [torch.zeros(count, dtype=torch.long)]
    )
    routes = routes[: batch * count].view(batch, count, count)[..., : draw.randint(1, count)]
    if batch and draw.random() < 0.1:
        _spoil(draw, values := [tensors.pop()])  # of queries and keys that are NaN, torch's fused attention makes 0
        tensors += values
    _compare(
        lambda q, k, v, backend: routed_attention(q, k, v, routes, region, backend=backend),
        tensors,
        (None, "native", "chunked", "reference"),
    )


def _points(draw) -> None:
    batch, heads, groups = draw.choice((0, 1, 2)), draw.choice((2, 4)), draw.choice((1, 2))
    height, width, count = draw.randint(1, 9), draw.randint(1, 70), draw.randint(1, 140)
    dim, dim_v, table = draw.randint(1, 33), draw.randint(1, 33), (draw.randint(1, 30), draw.randint(1, 60))
    tensors = [_tensor(draw, batch, height, width, heads, dim), _tensor(draw, batch, count, heads, dim)]
    tensors += [_tensor(draw, batch, count, heads, dim_v), _tensor(draw, heads, *table)]
    # Without gradients: the slope has kinks wherever a query reads a pixel of the table's.
    precision = torch.promote_types(torch.get_default_dtype(), torch.float32)
    axes = (torch.linspace(-1, 1, n, dtype=precision) if n > 1 else torch.zeros(1) for n in (height, width))
    places = torch.rand(batch, groups, count, 2, dtype=precision) * 2.8 - 1.4, *axes
    _compare(
        lambda *tensors, backend: point_attention(
            *tensors, *(x.to(torch.promote_types(tensors[0].dtype, precision)) for x in places), backend
        ),
        tensors,
        (None, "native", "rows", "whole"),
        "whole",
        draw.random() < 0.7,
    )


def _tokens(draw) -> None:
    batch, heads, dim, dim_v = draw.choice((0, 1, 2)), draw.randint(1, 3), draw.randint(1, 40), draw.randint(1, 5) * 8
    dim_v = draw.choice((dim_v, dim_v, draw.randint(1, 33)))
    if draw.random() < 0.5:
        operator, whole, tokens = token_attention, batch, (draw.randint(1, 120), draw.randint(1, 150))
        query, keys = (batch, heads, tokens[0]), (batch, heads, tokens[1])
    else:
        sides = [draw.randint(1, 9) for _ in range(4)]
        windows = batch, draw.randint(1, 3), draw.randint(1, 3), heads
        operator, whole, tokens = window_attention, 1, (sides[0] * sides[1], sides[2] * sides[3])
        query, keys = (*windows, *sides[:2]), (*windows, *sides[2:])
    tensors = [_tensor(draw, *query, dim), _tensor(draw, *keys, dim), _tensor(draw, *keys, dim_v)]
    if biased := draw.random() < 0.5:
        bias = _tensor(draw, *(draw.choice((1, most, most)) for most in (whole, heads, *tokens)))
        unseen = torch.rand(bias.shape[2:]) < draw.choice((0.0, 0.5))
        unseen[:, 0] = False  # of queries that see nothing, the reference in double precision makes NaN
        tensors.append(bias.masked_fill(unseen, -torch.inf))
    if batch and draw.random() < 0.1:
        _spoil(draw, values := [tensors[2]])
        tensors[2] = values[0]
    _compare(
        lambda *x, backend: operator(*x[:3], x[3] if biased else None, backend=backend),
        tensors,
        (None, "native", "reference"),
        gradients=False,
    )


def _deformable(draw) -> None:
    shapes = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 3))]
    batch, queries, heads, dim, points = (
        draw.randint(low, high) for low, high in ((0, 2), (0, 9), (1, 3), (1, 9), (1, 4))
    )
    value = _tensor(draw, batch, sum(height * width for height, width in shapes), heads, dim)
    # The slope changes at cells' centres: kinks are kept away from by a grid of odd parts.
    precision = torch.promote_types(torch.get_default_dtype(), torch.float32)
    locations = (torch.randint(-8, 40, (batch, queries, heads, len(shapes), points, 2)).to(precision) + 0.3517) / 33
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


def _level(draw) -> None:
    batch, heads, dims = draw.choice((0, 1, 2)), draw.randint(1, 3), draw.choice(((16, 16), (32, 64), (48, 16), (5, 3)))
    rows, columns, key_rows, key_columns = (draw.randint(1, 5) for _ in range(4))
    chosen = draw.randint(1, key_rows * key_columns)
    index = torch.rand(batch, heads, rows, columns, key_rows * key_columns).argsort(-1)[..., :chosen]
    topk = draw.randint(0, 4 * chosen)
    tensors = [
        _tensor(draw, batch, 2 * rows, 2 * columns, heads, dims[0]),
        *(_tensor(draw, batch, 2 * key_rows, 2 * key_columns, heads, dim) for dim in dims),
        _tensor(draw, batch, rows, columns, heads, dims[1]),
        _tensor(draw, batch, 2 * rows, 2 * columns, heads, dims[1]),
        torch.rand(()),
    ]

    def level(query, key, value, parent, base, share, backend):
        options = {"share": share, "parent": parent, "base": base, "backend": backend}
        return quadtree_level(query, key, value, index, topk, **options)[0]

    _compare(level, tensors, (None, "native", "reference"))


def _window_and_pooled(draw) -> None:
    window, batch, heads, dim = (
        draw.choice((3, 3, 5, 7)),
        draw.choice((0, 1, 2)),
        draw.randint(1, 3),
        draw.randint(1, 9),
    )
    height, width, pooled = draw.randint(1, 12), draw.randint(1, 12), draw.randint(1, 9)
    tensors = [_tensor(draw, batch, height, width, heads, dim) for _ in range(3)]
    if batch and draw.random() < 0.1:
        _spoil(draw, tensors)
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
    """Compare depthwise convolutions, linear layers of maps, MLPs' second halves, and readings between pixels."""
    batch, channels = draw.randint(0, 2), draw.choice((1, 7, 20, 64, 70))
    height, width = draw.randint(1, 14), draw.randint(1, 14)
    kernel, dilation = (draw.choice((1, 3, 5, 7)), draw.choice((1, 3, 5))), (draw.randint(1, 3), draw.randint(1, 3))
    x, gradients, stride = _tensor(draw, batch, channels, height, width), draw.random() < 0.5, draw.choice((1, 1, 2, 3))
    _compare(
        lambda x, w, b, backend: depthwise_conv2d(x, w, b, dilation, backend=backend, stride=stride),
        [x, _tensor(draw, channels, 1, *kernel), _tensor(draw, channels)],
        (None, "interleaved", "channels_last", "trained", "convolution"),
        "convolution",
        gradients,
    )
    x, wide, activation = (
        _tensor(draw, batch, height, width, channels, products=True),
        draw.randint(1, 20),
        draw.choice((None, "gelu")),
    )
    _compare(
        lambda x, w, b, backend: pointwise(x, w, b, backend, activation),
        [x, _tensor(draw, wide, channels), _tensor(draw, wide)],
        (None, "onednn", "onednn_trained", "convolution", "linear"),
        "linear",
        gradients,
    )
    weights = [_tensor(draw, wide, channels), _tensor(draw, wide)]
    convolved, residual = draw.random() < 0.7, draw.random() < 0.5
    if convolved:
        weights += [_tensor(draw, channels, 1, *kernel), _tensor(draw, channels)]
    with mock.patch.object(sys.modules[_Recomputed.__module__], "_PIECE", draw.choice((1, 50, 1000, 2**19))):
        _compare(
            lambda *tensors, backend: gelu_linear(*tensors, residual=residual and convolved, backend=backend),
            [x, *weights],
            (None, "recomputed", "reference"),
            "reference",
            gradients,
        )
    # As in `_deformable`, the slope's kinks are kept away from.
    precision = torch.promote_types(torch.get_default_dtype(), torch.float32)
    places = [(torch.randint(-2, length + 2, (batch, wide)).to(precision) * 33 + 12) / 33 for length in (height, width)]
    _compare(
        lambda x, rows, columns, backend: sample_bilinear(x, rows, columns, backend),
        [x, *places],
        (None, "bags", "gather"),
        "gather",
        gradients,
    )


def _misfits(draw) -> None:
    """Give an operator a tensor of another size: it is refused in one line, or means what the reference makes of it."""
    routes, chosen, heads = torch.tensor([[[0, 1], [2, 1], [3, 0], [3, 2]]] * 2), torch.tensor([[[[0, 3]] * 3] * 2]), 2
    operator, shapes, reference = draw.choice(
        [
            (lambda *x, backend: na2d(*x, 3, backend=backend), [(2, 6, 8, heads, 16)] * 3, "reference"),
            (lambda *x, backend: na2d_qk(*x, 3, backend=backend), [(2, 6, 8, heads, 16)] * 2, "reference"),
            (lambda *x, backend: routed_attention(*x, routes, 4, backend=backend), [(2, 8, 8, 2, 16)] * 3, "reference"),
            (
                lambda *x, backend: token_attention(*x, backend=backend),
                [(2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), (2, 3, 5, 7)],
                "reference",
            ),
            (lambda *x, backend: window_attention(*x, backend=backend), [(2, 2, 3, 2, 4, 5, 16)] * 3, "reference"),
            (
                lambda *x, backend: point_attention(*x, backend=backend),
                [
                    (2, 4, 30, heads, 16),
                    (2, 6, heads, 16),
                    (2, 6, heads, 16),
                    (heads, 9, 13),
                    (2, 2, 6, 2),
                    (4,),
                    (30,),
                ],
                "whole",
            ),
            (
                lambda *x, backend: multi_scale_deformable_attention(x[0], [(4, 5)], *x[1:], backend=backend),
                [(2, 20, heads, 16), (2, 5, heads, 1, 4, 2), (2, 5, heads, 1, 4)],
                "gathers",
            ),
            (lambda *x, backend: quadtree_scores(*x, chosen, backend=backend), [(1, 2, 3, 4, 8)] * 2, "reference"),
        ]
    )
    tensors = [torch.linspace(-1, 1, *shape) if len(shape) == 1 else torch.randn(shape) for shape in shapes]
    place = draw.randrange(len(shapes))
    sizes = list(shapes[place])
    axis = draw.randrange(len(sizes))
    sizes[axis] = draw.choice((0, 1, sizes[axis] - 1, sizes[axis] + 1, 2 * sizes[axis]))
    tensors[place] = torch.linspace(-1, 1, sizes[0]) if len(sizes) == 1 else torch.randn(sizes)
    for backend in (None, "native"):
        try:
            operator(*tensors, backend=backend)
        except (ValueError, IndexError) as error:
            if "\n" in str(error):
                raise Wrong(f"{sizes} is refused in several lines") from error
        else:
            _compare(operator, tensors, (backend,), reference, gradients=False)
