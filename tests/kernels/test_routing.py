"""The routed operator: its specification by brute force, its paths against each other, and bad arguments."""

from pathlib import Path

import pytest
import torch
from foveate.kernels import routed_attention, routing_backends
from foveate.kernels.neighborhood.native import load_function
from foveate.kernels.routing import chunked, native
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.versions

BACKENDS = ("reference", "chunked")
needs_native = pytest.mark.skipif(native._library is None, reason="the C library was not compiled")


def tensors(batch, grid, region, heads, dim, topk, dtype=torch.float64, value_dim=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, grid[0] * region[0], grid[1] * region[1], heads)
    q, k = (torch.randn(*shape, dim, generator=generator, dtype=dtype) for _ in range(2))
    v = torch.randn(*shape, value_dim or dim, generator=generator, dtype=dtype)
    regions = grid[0] * grid[1]
    return q, k, v, torch.randint(0, regions, (batch, regions, topk), generator=generator)


def one_query_at_a_time(q, k, v, routes, region, scale):
    """The definition, without any reshaping: collect the keys of a query's regions one by one."""
    height, width = region
    columns = q.shape[2] // width
    out = torch.empty(*q.shape[:4], v.shape[-1], dtype=q.dtype)
    for b, y, x, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:4])).tolist():
        keys, values = [], []
        for chosen in routes[b, y // height * columns + x // width].tolist():
            top, left = chosen // columns * height, chosen % columns * width
            for i in range(top, top + height):
                for j in range(left, left + width):
                    keys.append(k[b, i, j, h])
                    values.append(v[b, i, j, h])
        weights = (torch.stack(keys) @ q[b, y, x, h] * scale).softmax(0)
        out[b, y, x, h] = weights @ torch.stack(values)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", [(2, 3), (3, 1), (1, 1)])
def test_every_backend_is_the_definition(backend, region):
    q, k, v, routes = tensors(2, (2, 3), region, 2, 4, 3, value_dim=5)
    expected = one_query_at_a_time(q, k, v, routes, region, 0.7)
    torch.testing.assert_close(routed_attention(q, k, v, routes, region, scale=0.7, backend=backend), expected)


problems = st.tuples(
    st.integers(1, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 5),
)


@pytest.mark.parametrize("chunk", [1, 300, 1 << 20])
def test_chunks_equal_the_reference_forward_and_backward(chunk, monkeypatch):
    """However small the chunks: a few regions, one, some queries of one, one head."""
    monkeypatch.setattr(chunked, "_CHUNK", chunk)
    monkeypatch.setattr(chunked, "_COPY", chunk)

    @settings(max_examples=20, deadline=None, database=None)
    @given(problems)
    def check(problem):
        q, k, v, routes = tensors(*problem, value_dim=problem[4] + 1)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        outputs = [routed_attention(q, k, v, routes, problem[2], backend=backend) for backend in BACKENDS]
        torch.testing.assert_close(outputs[1], outputs[0])
        weight = torch.randn_like(outputs[0])
        gradients = [torch.autograd.grad((output * weight).sum(), inputs) for output in outputs]
        torch.testing.assert_close(gradients[1], gradients[0])

    check()


# Grid, region, heads, topk, dim of keys and of values: regions of one token to several blocks of lanes, keys of one
# tile and of several.
NATIVE = [
    ((2, 3), (1, 1), 1, 5, 16, 16),
    ((3, 2), (2, 2), 3, 4, 32, 16),
    ((2, 2), (3, 3), 2, 4, 32, 32),
    ((3, 1), (3, 5), 2, 2, 16, 48),
    ((2, 2), (10, 12), 2, 3, 32, 32),
]


@needs_native
@pytest.mark.parametrize("problem", NATIVE)
def test_native_equals_the_reference_forward_and_backward(problem):
    grid, region, heads, topk, dim, value_dim = problem
    q, k, v, routes = tensors(2, grid, region, heads, dim, topk, torch.float32, value_dim)
    q, k = torch.stack([q, k], 3).unbind(3)  # neighbors in memory, as a projection leaves them
    inputs = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(*q.shape[:-1], value_dim)
    outputs = [routed_attention(*inputs, routes, region, backend=name) for name in ("native", "reference")]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((output * weight).sum(), inputs) for output in outputs]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@needs_native
@pytest.mark.parametrize("region", [(2, 2), (4, 5)])
def test_native_keeps_what_a_query_does_not_see_out(region):
    q, k, v, routes = tensors(1, (2, 2), region, 2, 16, 2, torch.float32)
    routes[:] = torch.tensor([1, 2])
    k[0, 0, 0], v[0, -1, -1], q[0, 1, 1] = float("nan"), float("inf"), float("nan")
    out = routed_attention(q, k, v, routes, region, backend="native")
    assert out[0, 1, 1].isnan().all()
    assert out.isnan().sum() == out[0, 1, 1].numel()


@needs_native
def test_native_says_what_it_cannot_take():
    q, k, v, routes = tensors(1, (2, 2), (2, 2), 1, 8, 2, torch.float32)
    assert "multiples of 16; got 8 and 8" in routing_backends(q, k, v, routes, 2)["native"]
    assert "float32; got torch.float64" in routing_backends(*(x.double() for x in (q, k, v)), routes, 2)["native"]
    q, k, v = (x.repeat(1, 1, 1, 1, 2) for x in (q, k, v))
    with pytest.raises(IndexError, match=r"routes must be in \[0, 4\); got 4 to 4"):
        routed_attention(q, k, v, torch.full_like(routes, 4), 2, backend="native")


def test_operator_keeps_torchs_rules():
    """Schema, fake tensors, autograd registration and tracing, as torch's own checker sees them."""
    q, k, v, routes = tensors(2, (2, 3), (2, 3), 2, 4, 2)
    from foveate.kernels.routing.operator import routed_attention_op

    arguments = (*(x.requires_grad_() for x in (q, k, v)), routes, 2, 3, 0.5, "chunked")
    torch.library.opcheck(routed_attention_op, arguments)


def test_gradcheck():
    q, k, v, routes = tensors(1, (2, 2), (2, 3), 2, 3, 2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: routed_attention(q, k, v, routes, (2, 3)), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    q, k, v, routes = tensors(2, (3, 2), (5, 3), 2, 16, 4, torch.float32)
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    rounded = routed_attention(*inputs, routes, (5, 3))
    assert rounded.dtype == dtype
    assert routing_backends(*inputs, routes, (5, 3))["native" if native._library else "chunked"] == "chosen"
    exact = routed_attention(q, k, v, routes, (5, 3), backend="reference")
    torch.testing.assert_close(rounded.float(), exact, atol=0.03, rtol=0.03)
    rounded.float().square().sum().backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in inputs)


def test_strided_inputs_need_no_copy_by_the_caller():
    qkv = torch.randn(2, 6, 10, 3, 2, 8)
    routes = torch.randint(0, 4, (2, 4, 3))
    q, k, v = qkv.unbind(3)
    expected = routed_attention(q.contiguous(), k.contiguous(), v.contiguous(), routes, (3, 5))
    torch.testing.assert_close(routed_attention(q, k, v, routes, (3, 5)), expected)


def test_empty_batch():
    q, k, v, routes = tensors(0, (2, 2), (2, 3), 2, 4, 2)
    assert routed_attention(q, k, v, routes, (2, 3)).shape == (0, 4, 6, 2, 4)


def test_images_do_not_see_each_other():
    q, k, v, routes = tensors(3, (2, 3), (2, 2), 2, 8, 2)
    batched = routed_attention(q, k, v, routes, 2)
    single = [routed_attention(*(x[i : i + 1] for x in (q, k, v, routes)), 2) for i in range(3)]
    torch.testing.assert_close(batched, torch.cat(single))
    with pytest.raises(IndexError, match=r"\[0, 6\); got 0 to 6"):
        routed_attention(q, k, v, torch.arange(18).view(3, 6, 1) % 7, 2)


X = torch.zeros(1, 8, 9, 2, 4)
R = torch.zeros(1, 6, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], X, X, R, (4, 3)), {}, r"query as \[B, H, W, heads, dim\]; got 4 axes"),
        ((X, X.half(), X, R, (4, 3)), {}, "one floating-point dtype"),
        ((X, X[:, :4], X, R, (4, 3)), {}, "of one shape"),
        ((X, X, X.to("meta"), R, (4, 3)), {}, "one device"),
        ((X, X, X, R, (3, 3)), {}, "height to be a multiple of the region's; got 8 and 3"),
        ((X, X, X, R, (4, 3, 1)), {}, "region_size as an integer or two"),
        ((X, X, X, R[:, :5], (4, 3)), {}, r"= \[1, 6, 1 or more\]; got \[1, 5, 2\]"),
        ((X, X, X, R[..., :0], (4, 3)), {}, r"got \[1, 6, 0\]"),
        ((X, X, X, R.float(), (4, 3)), {}, "routes in int32 or int64"),
        (
            (X, X, X, R, (4, 3)),
            {"backend": "flash"},
            "no backend 'flash'; it has 'triton', 'native', 'chunked'",
        ),
    ],
)
def test_bad_arguments_are_one_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        routed_attention(*arguments, **options)
    assert "\n" not in str(error.value)


def test_triton_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' cannot run here: it needs tensors on a GPU"):
        routed_attention(X, X, X, R, (4, 3), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        routed_attention(*(X.double(),) * 3, R, (4, 3), backend="triton")
    with pytest.raises(ValueError, match="value's dim"):
        routed_attention(X, X, X[..., :3], R, (4, 3), backend="triton")
    wide = torch.zeros(1, 8, 9, 1, 129)
    with pytest.raises(ValueError, match="at most 128; got 129"):
        routed_attention(wide, wide, wide, R, (4, 3), backend="triton")


@needs_native
@pytest.mark.parametrize("isa", ["AVX2", "DEFAULT"])
@pytest.mark.parametrize("region", [(2, 2), (5, 7)])
def test_every_instruction_set_computes_the_same(isa, region, monkeypatch):
    q, k, v, routes = tensors(2, (2, 2), region, 2, 16, 3, torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = routed_attention(*inputs, routes, region, backend="native")
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: isa)
        library, _ = load_function(Path(native.__file__).with_name("_native.c.so"), "foveate_routed")
    # A compiler may know no other set than the plain one.
    assert library.call.__name__ in ("foveate_routed", f"foveate_routed_{isa.lower()}")
    monkeypatch.setattr(native, "_library", library)
    out = routed_attention(*inputs, routes, region, backend="native")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), inputs), gradients, atol=1e-4, rtol=1e-4)
