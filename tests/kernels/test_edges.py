"""Operators at their edges: nothing at all, numbers that are not finite, strides of any kind, derivatives twice."""

import pytest
import torch
from foveate.kernels import (
    depthwise_conv2d,
    multi_scale_deformable_attention,
    na1d,
    na2d,
    na2d_av,
    na2d_qk,
    na3d,
    point_attention,
    quadtree_scores,
    quadtree_values,
    routed_attention,
)
from foveate.kernels.aggregated import aggregated_attention
from foveate.kernels.neighborhood import native
from foveate.kernels.pointwise import pointwise
from torch.autograd import forward_ad

needs_library = pytest.mark.skipif(native._library is None, reason=str(native._missing))
NEIGHBORHOOD = [None, pytest.param("native", marks=needs_library), "tiled", "reference"]


def random(*shape):
    return torch.randn(shape, requires_grad=True)


def check(operator, *inputs):
    """Differentiate a call; every operand has a gradient of its shape."""
    out = operator(*inputs)
    gradients = torch.autograd.grad(out.sum(), [x for x in inputs if x.requires_grad])
    assert [x.shape for x in gradients] == [x.shape for x in inputs if x.requires_grad]
    return out


@pytest.mark.parametrize("backend", NEIGHBORHOOD)
@pytest.mark.parametrize("shape", [(0, 7, 7, 2, 4), (2, 7, 7, 0, 4), (1, 7, 7, 2, 0)])
def test_neighborhoods_of_nothing(backend, shape):
    q, k, v = random(*shape), random(*shape), random(*shape)
    check(lambda *x: na2d(*x, 3, backend=backend), q, k, v)
    check(lambda *x: na2d_qk(*x, 3, backend=backend), q, k)
    check(lambda *x: na2d_av(*x, 3, backend=backend), random(*shape[:-1], 9), v)
    values = random(*shape[:-1], 3)
    out = check(lambda *x: na2d(*x, 3, backend=backend), q, k, values)
    if shape[-1] == 0:  # all scores are zero
        torch.testing.assert_close(out[:, 3, 3], values[:, 2:5, 2:5].mean((1, 2)))


@pytest.mark.parametrize("backend", [None, "chunked", "reference"])
@pytest.mark.parametrize("sizes", [(0, 2, 4, 4), (1, 0, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0)])
def test_routes_of_nothing(backend, sizes):
    batch, heads, dim, dim_v = sizes
    q, k, v = (random(batch, 4, 6, heads, last) for last in (dim, dim, dim_v))
    routes = torch.ones(batch, 4, 1, dtype=torch.int64)
    out = check(lambda *x: routed_attention(*x, routes, (2, 3), backend=backend), q, k, v)
    if dim == 0:
        torch.testing.assert_close(out[:, 0, 0], v[:, :2, 3:].mean((1, 2)))


@pytest.mark.parametrize("backend", [None, "bags", "reference", "gathers"])
@pytest.mark.parametrize("sizes", [(0, 5, 2, 4, 3), (1, 0, 2, 4, 3), (1, 5, 0, 4, 3), (1, 5, 2, 0, 3), (1, 5, 2, 4, 0)])
def test_points_of_nothing(backend, sizes):
    batch, queries, heads, dim, points = sizes
    locations, weights = random(batch, queries, heads, 2, points, 2), random(batch, queries, heads, 2, points)
    check(
        lambda *x: multi_scale_deformable_attention(x[0], [(5, 7), (3, 4)], *x[1:], backend=backend),
        random(batch, 5 * 7 + 3 * 4, heads, dim),
        locations,
        weights,
    )


@pytest.mark.parametrize("backend", [None, "chunked", "reference"])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 2, 4), (1, 0, 4, 2, 4), (1, 3, 0, 0, 4), (1, 3, 4, 0, 4), (1, 3, 4, 2, 0)])
def test_tokens_of_nothing(backend, sizes):
    batch, parents, tokens, count, dim = sizes
    chosen = torch.zeros(batch, 2, parents, count, dtype=torch.int64)
    children = random(batch, 2, tokens, 4, dim)
    check(lambda *x: quadtree_scores(*x, chosen, backend=backend), random(batch, 2, parents, 4, dim), children)
    weights = random(batch, 2, parents, 4, 4 * count)
    check(lambda *x: quadtree_values(*x, chosen, backend=backend), weights, children)


def test_routes_may_lie_anyhow():
    q, k, v = (random(2, 4, 6, 2, 4) for _ in range(3))
    routes = torch.randint(0, 4, (2, 2, 4)).transpose(1, 2)
    expected = routed_attention(q, k, v, routes.contiguous(), (2, 3))
    for strided in (routes, routes.contiguous()[:, :, None].expand(-1, -1, 3, -1)[:, :, 1]):
        assert torch.equal(check(lambda *x: routed_attention(*x, strided, (2, 3)), q, k, v), expected)  # noqa: B023


@pytest.mark.parametrize("backend", NEIGHBORHOOD[1:])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_a_query_does_not_see_has_no_part(backend, causal, number):
    """One operand at a time has such numbers at two positions; what depends on neither is what it was."""
    torch.manual_seed(0)
    operands = {name: torch.randn(1, 11, 13, 2, 4) for name in ("query", "key", "value", "grad")}
    options = {"kernel_size": (3, 5), "dilation": (2, 1), "is_causal": (causal, False)}

    def run(query, key, value, grad):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        out, lse = na2d(*inputs, **options, backend=backend, return_lse=True)
        return out.detach(), *torch.autograd.grad((out * grad).sum() + lse.sum(), inputs)

    expected = run(**operands)
    # How many heads' positions of the output and of the three gradients depend on the two.
    reference = {"key": (26, 26, 60, 60), "value": (26, 26, 60, 0), "query": (2, 2, 30, 30), "grad": (0, 2, 30, 30)}
    if causal:
        reference |= {"key": (18, 18, 60, 60), "value": (18, 18, 60, 0)}
    for name, counts in reference.items():
        bad = operands[name].clone()
        bad[0, 10, 12, 0] = bad[0, 4, 6, 1] = number
        results = run(**operands | {name: bad})
        for result, before, most in zip(results, expected, counts, strict=True):
            touched = ~result.isfinite().all(-1)
            assert touched.sum() <= most
            if number != number:  # an infinite key may have a weight of zero
                assert touched.sum() == most
            torch.testing.assert_close(result[~touched], before[~touched])


@pytest.mark.parametrize("backend", NEIGHBORHOOD[1:])
def test_weights_of_nothing_seen_have_no_part_in_sums(backend):
    torch.manual_seed(0)
    weights, value = random(1, 9, 9, 1, 9), torch.randn(1, 9, 9, 1, 2)
    value[0, 8, 8] = float("nan")
    out = na2d_av(weights, value, 3, is_causal=True, backend=backend)
    assert out.isnan().any(-1).sum() == 1
    (gradient,) = torch.autograd.grad(out[:, :7, :7].sum(), weights)
    assert gradient[:, :7, :7].isfinite().all()


@needs_library
@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_every_nan_stays_one(lanes, monkeypatch):
    """A NaN may carry other bits; the vectors' exponential took some for numbers."""
    if lanes > native._library.lanes:
        pytest.skip("no such instruction set here")
    monkeypatch.setattr(native._library, "lanes", lanes)
    for bits in (0x7FC00040, 0x7F800001, -1, 0x7FC001FF):
        key = torch.ones(1, 16, 1, 1)
        key[0, 5] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        out = na1d(torch.ones(1, 16, 1, 1), key, torch.ones(1, 16, 1, 1), 3, backend="native").flatten()
        assert out.isnan().nonzero().flatten().tolist() == [4, 5, 6]


def test_tiled_gradients_under_checkpointing_and_open_sizes():
    q, k, v = (random(1, 9, 8, 2, 4) for _ in range(3))
    call = lambda *x: na2d(*x, 3, backend="tiled").square().sum()  # noqa: E731
    again = torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v)) for x in (call(q, k, v), again)), strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: na1d(*x, 3, backend="tiled"), dynamic=True, backend="aot_eager")
    for size in (5, 6):
        q, k, v = (torch.randn(1, size, 1, 4) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v), na1d(q, k, v, 3, backend="tiled"))


@needs_library
@pytest.mark.parametrize("with_lse", [False, True])
def test_second_derivatives_where_no_path_was_asked_for(with_lse):
    torch.manual_seed(0)
    q, rpb = random(1, 6, 7, 4, 4), random(4, 5, 5)
    k, v = random(1, 6, 7, 2, 4), random(1, 6, 7, 2, 3)

    def penalty(backend):
        out = na2d(q, k, v, 3, rpb=rpb, backend=backend, return_lse=with_lse)
        loss = sum(x.square().sum() for x in (out if with_lse else (out,)))
        gradients = torch.autograd.grad(loss, (q, k, v, rpb), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in gradients), (q, k, v, rpb))

    for a, b in zip(penalty(None), penalty("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="FOVEATE_NEIGHBORHOOD_BACKEND=tiled"):
        penalty("native")


ROUTES, INDEX = torch.tensor([[[0, 1], [2, 1], [3, 0], [3, 2]]]), torch.tensor([[[[0, 3], [1, 5], [2, 2]]] * 2])
DRAWN = torch.Generator().manual_seed(0)  # before any test sets a seed of its own
LOCATIONS = torch.rand(1, 5, 2, 1, 4, 2, generator=DRAWN) / 2 + 0.2371
PLACES = torch.rand(1, 1, 6, 2, generator=DRAWN) - 0.4817


def _points(q, k, v, table):
    axes = (torch.linspace(-1, 1, n, dtype=q.dtype) for n in q.shape[1:3])
    return point_attention(q, k, v, table, PLACES.to(q.dtype), *axes)


@pytest.mark.parametrize(
    ("operator", "shapes"),
    [
        (lambda q, k, v: na2d(q, k, v, 3), [(1, 8, 8, 2, 16)] * 3),
        (lambda q, k: na2d_qk(q, k, 3), [(1, 8, 8, 2, 16)] * 2),
        (lambda w, v: na2d_av(w, v, 3), [(1, 8, 8, 2, 9), (1, 8, 8, 2, 16)]),
        (lambda q, k, v: routed_attention(q, k, v, ROUTES, 4), [(1, 8, 8, 2, 16)] * 3),
        (_points, [(1, 4, 37, 2, 16), (1, 6, 2, 16), (1, 6, 2, 16), (2, 9, 13)]),
        (
            lambda v, w: multi_scale_deformable_attention(v, [(8, 8)], LOCATIONS.to(v.dtype), w),
            [(1, 64, 2, 16), (1, 5, 2, 1, 4)],
        ),
        (lambda q, k: quadtree_scores(q, k, INDEX), [(1, 2, 3, 4, 8), (1, 2, 6, 4, 8)]),
        (lambda w, v: quadtree_values(w, v, INDEX), [(1, 2, 3, 4, 8), (1, 2, 6, 4, 8)]),
        (lambda x, w, b: pointwise(x, w, b, activation="gelu"), [(1, 40, 40, 16), (8, 16), (8,)]),
        (depthwise_conv2d, [(1, 8, 12, 12), (8, 1, 3, 3)]),
    ],
)
def test_derivatives_are_carried_along(operator, shapes):
    """An operator of torch.library drops those of dual numbers without a word."""
    torch.manual_seed(0)
    x, along = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    exact = [part.double() for part in x], [part.double() for part in along]
    plus, minus = (operator(*(a + s * b for a, b in zip(*exact, strict=True))) for s in (1e-5, -1e-5))
    with forward_ad.dual_level():
        out = operator(*map(forward_ad.make_dual, x, along))
        derivative = forward_ad.unpack_dual(out).tangent
    assert derivative is not None
    torch.testing.assert_close(derivative.double(), (plus - minus) / 2e-5, atol=1e-4, rtol=1e-3)
    carried = lambda *x: torch.func.jvp(operator, x, tuple(along))[1]  # noqa: E731
    torch.testing.assert_close(carried(*x).double(), (plus - minus) / 2e-5, atol=1e-4, rtol=1e-3)
    torch.compiler.reset()
    with torch.no_grad():
        derivative = torch.compile(carried, backend="aot_eager")(*x)
    torch.testing.assert_close(derivative.double(), (plus - minus) / 2e-5, atol=1e-4, rtol=1e-3)


@needs_library
def test_paths_without_derivatives_along_are_refused():
    x = torch.randn(1, 8, 8, 2, 16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        for backend in ("native", "tiled"):
            with pytest.raises(ValueError, match=f"'{backend}' cannot run here"):
                na2d(dual, x, x, 3, backend=backend)
        with pytest.raises(ValueError, match="'native' cannot run here"):
            routed_attention(dual, x, x, ROUTES, 4, backend="native")


@pytest.mark.parametrize("dim", [16, 6])  # in C, where it was compiled, and in chunks
def test_second_derivatives_of_routes_where_no_path_was_asked_for(dim):
    q, k, v = (random(2, 8, 8, 2, dim) for _ in range(3))
    routes = ROUTES.expand(2, -1, -1)

    def penalty(backend):
        out = routed_attention(q, k, v, routes, 4, backend=backend)
        first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v))

    for actual, expected in zip(penalty(None), penalty("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="name none, or backend='reference'"):
        penalty("chunked")


def test_second_derivatives_of_points_of_maps():
    torch.manual_seed(0)
    values, weights, locations = random(1, 64, 2, 16), random(1, 5, 2, 1, 4), LOCATIONS.clone().requires_grad_()
    operands = values, locations, weights

    def penalty(backend):
        tied = weights + values.mean()  # the way between two operands counts once
        out = multi_scale_deformable_attention(values, [(8, 8)], locations, tied, backend=backend)
        first = torch.autograd.grad(out.square().sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), operands)

    expected = penalty("gathers")
    for backend in (None, "bags") if native._library is None else (None, "bags", "native"):
        for actual, exact in zip(penalty(backend), expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_is_not_finite_stays_alone_in_any_dtype(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 6, 3, 1, 16).to(dtype) for _ in range(3))
    q[:, 2] = float("nan")
    options = {"kernel_size": (6, 6, 2), "stride": (5, 1, 2), "is_causal": (False, True, True)}
    for backend in ("tiled", "reference"):
        assert na3d(q, k, v, backend=backend, **options).isnan().any(-1).sum() == 18, backend


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("operand", ["key", "value"])
def test_a_window_that_is_cut_does_not_see_what_the_shifted_one_does(operand, number):
    """Without gradients the windows of the borders are shifted ones, whose weights beyond the cut one are zero."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(1, 6, 8, 2, 8) for name in ("query", "key", "value")}
    tensors[operand][:, 4] = number
    pooled = torch.randn(1, 3, 2, 8)
    bias = torch.randn(2, 25)

    def attend():
        inputs = (*tensors.values(), pooled, pooled, bias, torch.zeros(2, 48, 3))
        return aggregated_attention(*inputs, lambda x, first, end: x[:, first * 8 : end * 8])

    with torch.no_grad():
        out = attend()
    assert out[:, :2].isfinite().all()
    assert not out[:, 3:5].isfinite().all()
    torch.testing.assert_close(out, attend(), equal_nan=True)


@pytest.mark.parametrize(("operand", "seeing"), [("query", [5]), ("key", [3, 4, 5, 6, 7]), ("value", [3, 4, 5, 6, 7])])
@pytest.mark.parametrize("gradients", [True, False])
def test_pooled_products_of_bfloat16_keep_rows_apart(operand, seeing, gradients):
    """Torch's own products don't, on CPUs with AMX: what one query sees would reach those beside it."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(2, 9, 11, 1, 5, dtype=torch.bfloat16) for name in ("query", "key", "value")}
    tensors[operand][:, 5] = float("nan")
    pooled, bias = torch.randn(2, 9, 1, 5, dtype=torch.bfloat16), torch.randn(1, 25, dtype=torch.bfloat16)
    table, added = torch.randn(1, 99, 9, dtype=torch.bfloat16), torch.randn(2, 9, 11, 1, 25, dtype=torch.bfloat16)
    with torch.set_grad_enabled(gradients):
        out = aggregated_attention(
            *tensors.values(), pooled, pooled, bias, table, lambda x, first, end: x[:, first * 11 : end * 11], added
        )
    assert out.dtype == torch.bfloat16
    assert sorted(set((~out.isfinite()).nonzero()[:, 1].tolist())) == seeing
