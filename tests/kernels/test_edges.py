"""Operators at their edges: nothing at all, numbers that are not finite, strides of any kind, derivatives twice."""

import pytest
import torch
from foveate.kernels import (
    multi_scale_deformable_attention,
    na1d,
    na2d,
    na2d_av,
    na2d_qk,
    quadtree_scores,
    quadtree_values,
    routed_attention,
)
from foveate.kernels.neighborhood import native

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
