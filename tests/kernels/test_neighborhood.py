"""The neighborhood operator against its fixtures, its specification, and bad arguments."""

import json
import random

import numpy as np
import pytest
import torch
from foveate.kernels import na1d, na2d, na3d, neighborhood_backends, set_neighborhood_backend
from foveate.kernels.neighborhood.boxes import _Cut
from foveate.kernels.neighborhood.window import Axis, axis_offsets, axis_windows
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.versions

BACKENDS = ("reference", "tiled", "boxes")


def tensors(shape, kernel_size, rpb=True, dtype=torch.float32, seed=0, value_dim=None):
    generator = torch.Generator().manual_seed(seed)
    *rest, dim = shape
    heads = shape[3]
    q, k = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    v = torch.randn(*rest, value_dim or dim, generator=generator, dtype=dtype)
    size = (heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
    return q, k, v, torch.randn(size, generator=generator, dtype=dtype) if rpb else None


def test_windows_are_the_published_key_sets(golden_folder):
    cases = json.loads((golden_folder / "na_op" / "windows_1axis.json").read_text())
    assert len(cases) >= 20
    for case in cases:
        expected = case.pop("windows")
        windows = [[key for key in keys if key >= 0] for keys in axis_windows(**case).tolist()]
        assert windows == expected, case


def test_offset_of_the_own_position_is_the_middle():
    windows, first = axis_windows(11, 3, 2), axis_offsets(Axis(11, 3, dilation=2))
    offsets = first[:, None] + np.arange(3)
    assert (offsets[windows == np.arange(11)[:, None]] == 2).all()
    assert offsets.min() == 0
    assert offsets.max() == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixtures(backend, golden_folder):
    paths = sorted((golden_folder / "na_op").glob("[123]d_*.npz"))
    assert len(paths) >= 40
    for path in paths:
        case = np.load(path)
        meta = json.loads(str(case["meta"]))
        q, k, v = (torch.from_numpy(case[name]) for name in "qkv")
        extra = [torch.from_numpy(case[name]) if name in case else None for name in ("rpb", "add_k", "add_v")]
        out, lse = (na1d, na2d, na3d)[len(meta["spatial"]) - 1](
            q,
            k,
            v,
            **{name: tuple(meta[name]) for name in ("kernel_size", "stride", "dilation", "is_causal")},
            scale=meta["scale"],
            rpb=extra[0],
            additional_keys=extra[1],
            additional_values=extra[2],
            backend=backend,
            return_lse=True,
        )
        for name, actual in (("out", out), ("lse", lse)):
            error = (actual - torch.from_numpy(case[name])).abs().max().item()
            assert error <= 2e-6, f"{path.stem}: {name} {error:.1e}"


@st.composite
def problems(draw):
    """Draw the tensors' shapes and the options of a call of any rank."""
    rank = draw(st.integers(1, 3))
    per_axis = lambda values: tuple(draw(values) for _ in range(rank))  # noqa: E731
    kernel = per_axis(st.integers(2, 5 if rank < 3 else 3))
    dilation = per_axis(st.integers(1, 3 if rank < 3 else 2))
    size = tuple(k * d + draw(st.integers(0, 7 if rank < 3 else 3)) for k, d in zip(kernel, dilation, strict=True))
    biased = draw(st.booleans()) and all(k % 2 for k in kernel)
    options = {"kernel_size": kernel, "dilation": dilation}
    if not biased:
        options["stride"] = tuple(draw(st.integers(1, k)) for k in kernel)
        options["is_causal"] = per_axis(st.booleans())
    heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    dim, dim_v, more = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 2))
    batch = draw(st.integers(1, 2))
    shapes = {
        "query": (batch, *size, heads_kv * group, dim),
        "key": (batch, *size, heads_kv, dim),
        "value": (batch, *size, heads_kv, dim_v),
    }
    if biased:
        shapes["rpb"] = (heads_kv * group, *(2 * k - 1 for k in kernel))
    if more:
        shapes |= {
            "additional_keys": (batch, more, heads_kv, dim),
            "additional_values": (batch, more, heads_kv, dim_v),
        }
    return (na1d, na2d, na3d)[rank - 1], shapes, options


@settings(max_examples=60, deadline=None)
@given(problems(), st.booleans())
def test_tiled_equals_reference(problem, return_lse):
    operator, shapes, options = problem
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }
    results = []
    for backend in BACKENDS:
        outputs = operator(**inputs, **options, backend=backend, return_lse=return_lse)
        outputs = outputs if return_lse else (outputs,)
        loss = sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, list(inputs.values()))))
    for reference, *others in zip(*results, strict=True):
        for actual in others:
            torch.testing.assert_close(actual, reference)


def test_boxes_are_cut_alike_where_the_length_is_unknown(monkeypatch):
    draw = random.Random(0)
    for _ in range(200):
        kernel, dilation = draw.choice([2, 3, 5, 7]), draw.choice([1, 1, 2, 3])
        stride, length = draw.choice([1, 1, 2, kernel]), kernel * dilation + draw.randrange(30)
        known = _Cut(Axis(length, kernel, stride, dilation, draw.random() < 0.3), torch.device("cpu"))
        keys, entries = known.keys(), known.entries()
        monkeypatch.setattr(known, "_known", False)
        assert torch.equal(known.keys(), keys)
        assert torch.equal(known.entries(), entries)
        # Where boxes are longer than the axis, what is beyond its end isn't seen.
        unseen, seen = 2 * kernel - 1, (entries < 2 * kernel - 1).sum()
        pairs = _pairs(keys, entries, known)
        known.box = known._box(known.tile)
        assert known.keys().max() < known.ranks
        entries = known.entries()
        assert (entries < unseen).sum() == seen
        assert torch.equal(_pairs(known.keys(), entries, known), pairs)


def _pairs(keys, entries, cut):
    """Return the key and the entry of all pairs that are seen, query by query."""
    keys = keys[None, :, None].expand(cut.axis.dilation, -1, cut.tile, -1)
    entries = entries.view(keys.shape)
    seen = entries < 2 * cut.axis.kernel_size - 1
    return torch.stack([keys[seen], entries[seen]])


@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_gradcheck_with_bias(dilation):
    q, k, v, rpb = tensors((1, 7, 10, 2, 3), (3, 3), dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, rpb)]
    assert torch.autograd.gradcheck(lambda q, k, v, rpb: na2d(q, k, v, 3, dilation=dilation, rpb=rpb), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    q, k, v, rpb = tensors((2, 15, 11, 2, 16), (7, 7))
    exact = na2d(q, k, v, 7, rpb=rpb)
    rounded = na2d(q.to(dtype), k.to(dtype), v.to(dtype), 7, rpb=rpb)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float(), exact, atol=0.03, rtol=0.03)


def test_strided_inputs_need_no_copy_by_the_caller():
    qkv = torch.randn(2, 9, 12, 3, 2, 8)
    q, k, v = qkv.unbind(3)
    expected = na2d(q.contiguous(), k.contiguous(), v.contiguous(), 5)
    torch.testing.assert_close(na2d(q, k, v, 5), expected)


def test_empty_batch():
    assert na2d(*(torch.zeros(0, 7, 7, 2, 4),) * 3, 3).shape == (0, 7, 7, 2, 4)


def test_batched_equals_one_by_one():
    q, k, v, rpb = tensors((3, 13, 9, 2, 8), (3, 3))
    batched = na2d(q, k, v, 3, dilation=2, rpb=rpb)
    single = [na2d(q[i : i + 1], k[i : i + 1], v[i : i + 1], 3, dilation=2, rpb=rpb) for i in range(3)]
    torch.testing.assert_close(batched, torch.cat(single))


X = torch.zeros(1, 8, 9, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], X, X, 3), {}, r"query as \[B, H, W, heads, dim\]; got 4 axes"),
        ((X, X, X, 9), {}, "height: kernel_size 9 x dilation 1 = 9 > 8"),
        ((X, X, X, (3, 5)), {"dilation": (1, 2)}, "width: kernel_size 5 x dilation 2 = 10 > 9"),
        ((X, X, X, 1), {}, "kernel_size of at least 2; got 1 on the height"),
        ((X, X, X, 3), {"dilation": (1, 0)}, "dilation of at least 1; got 0 on the width"),
        ((X, X, X, 3), {"stride": 4}, "stride between 1 and the kernel_size 3; got 4 on the height"),
        ((X, X, X, 3), {"stride": 0}, "stride between 1 and the kernel_size 3; got 0"),
        ((X, X, X, 3), {"is_causal": 1}, "is_causal as a bool"),
        ((X, X, X, (3, 3, 3)), {}, "kernel_size as an integer, or one for each of height, width"),
        ((X, X, X, 3.0), {}, "kernel_size as an integer"),
        ((X, X.half(), X, 3), {}, "one floating-point dtype"),
        ((X.int(), X.int(), X.int(), 3), {}, "one floating-point dtype"),
        ((X, X[:, :7], X, 3), {}, "of one shape"),
        ((X, X, X[..., :1, :], 3), {}, "of one shape"),
        ((X[..., :1, :], X, X, 3), {}, "of one shape"),
        ((X, X, X.to("meta"), 3), {}, "one device"),
        ((X, X, X, 3), {"rpb": torch.zeros(2, 5, 4)}, r"= \[2, 5, 5\]"),
        ((X, X, X, 3), {"rpb": torch.zeros(3, 5, 5)}, r"= \[2, 5, 5\]"),
        ((X, X, X, 4), {"rpb": torch.zeros(2, 7, 7)}, "odd kernel sizes only"),
        ((X, X, X, 3), {"rpb": torch.zeros(2, 5, 5), "stride": 2}, "neither with a stride nor on a causal axis"),
        ((X, X, X, 3), {"rpb": torch.zeros(2, 5, 5, dtype=torch.float64)}, "rpb in float32"),
        ((X, X, X, 3), {"additional_keys": X[:, 0]}, "together, or neither"),
        ((X, X, X, 3), {"additional_keys": X[0], "additional_values": X[0]}, r"= \[1, 9, 2, 4\] and"),
        ((X, X, X, 3), {"backend": "xformers"}, r"no backend 'xformers'; it has .*'tiled'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        na2d(*arguments, **options)
    assert "\n" not in str(error.value)


def test_chosen_backend_is_told_with_reasons():
    report = neighborhood_backends(X, X, X, 3, dilation=2)
    assert list(report.values()).count("chosen") == 1
    assert neighborhood_backends(X, X, X, 3, backend="reference")["reference"] == "chosen"


def test_backend_can_be_set_for_all_calls():
    set_neighborhood_backend("reference")
    try:
        assert neighborhood_backends(X, X, X, 3)["reference"] == "chosen"
        assert neighborhood_backends(X, X, X, 3, backend="tiled")["tiled"] == "chosen"
    finally:
        set_neighborhood_backend(None)
    with pytest.raises(ValueError, match="no backend 'fastest'"):
        set_neighborhood_backend("fastest")


def test_compiled_and_vmapped_calls_equal_eager_ones():
    q, k, v, rpb = tensors((3, 12, 10, 2, 8), (3, 3))
    torch.compiler.reset()
    compiled = torch.compile(na2d, fullgraph=True, backend="aot_eager")
    expected = na2d(q, k, v, 3, dilation=2, rpb=rpb)
    torch.testing.assert_close(compiled(q, k, v, 3, dilation=2, rpb=rpb), expected)
    one_by_one = torch.vmap(lambda q, k, v: na2d(q[None], k[None], v[None], 3, dilation=2, rpb=rpb)[0])
    torch.testing.assert_close(one_by_one(q, k, v), expected)


def test_meta_tensors_give_shapes():
    x = torch.empty(2, 9, 30, 2, 16, device="meta")
    out, lse = na2d(x, x, x[..., :8], 5, return_lse=True)
    assert out.shape == (2, 9, 30, 2, 8)
    assert lse.shape == (2, 9, 30, 2)


def test_checkpointing_gives_the_same_gradients():
    q, k, v, rpb = (x.requires_grad_() for x in tensors((1, 9, 8, 2, 4), (3, 3)))
    call = lambda *x: na2d(*x[:3], 3, rpb=x[3]).square().sum()  # noqa: E731
    plain = torch.autograd.grad(call(q, k, v, rpb), (q, k, v, rpb))
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(call, q, k, v, rpb, use_reentrant=False), (q, k, v, rpb)
    )
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mapped", ["query", "rpb"])
def test_tiled_gradients_can_be_mapped(mapped):
    q, k, v, rpb = tensors((2, 5, 7, 2, 3), (3, 3), dtype=torch.float64)
    many = torch.stack([q, 2 * q]) if mapped == "query" else torch.stack([rpb, 2 * rpb])

    def gradients(x):
        operands = (x, k, v, rpb) if mapped == "query" else (q, k, v, x)
        call = lambda q, k, v, rpb: na2d(q, k, v, 3, rpb=rpb, backend="tiled").pow(2).sum()  # noqa: E731
        return torch.func.grad(call, argnums=(0, 1, 2, 3))(*operands)

    for together, apart in zip(torch.vmap(gradients)(many), zip(*map(gradients, many), strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(apart))


def test_tiled_has_second_derivatives():
    q, k, v, rpb = (x.requires_grad_() for x in tensors((1, 4, 7, 1, 2), (3, 3), dtype=torch.float64))
    call = lambda *x: na2d(*x[:3], 3, rpb=x[3], backend="tiled", return_lse=True)  # noqa: E731
    torch.autograd.gradgradcheck(call, (q, k, v, rpb))


def test_tiled_keeps_only_its_operands_for_the_backward_pass():
    operands = [x.requires_grad_() for x in tensors((1, 12, 12, 2, 4), (5, 5))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        na2d(*operands[:3], 5, rpb=operands[3], backend="tiled")
    assert set(kept) == {x.data_ptr() for x in operands}
