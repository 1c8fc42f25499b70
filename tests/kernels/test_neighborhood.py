"""The neighborhood operator against its fixtures, its specification, and bad arguments."""

import json

import numpy as np
import pytest
import torch
from foveate.kernels import na2d
from foveate.kernels.neighborhood.window import axis_offsets, axis_windows
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = ("reference", "tiled")


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
    plain = [case for case in cases if case["stride"] == 1 and not case["is_causal"]]
    assert len(plain) >= 5
    for case in plain:
        assert axis_windows(case["length"], case["kernel_size"], case["dilation"]).tolist() == case["windows"]


def test_offset_of_the_own_position_is_the_middle():
    windows, offsets = axis_windows(11, 3, 2), axis_offsets(11, 3, 2)
    assert (offsets[windows == np.arange(11)[:, None]] == 2).all()
    assert offsets.min() == 0
    assert offsets.max() == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixtures(backend, golden_folder):
    paths = sorted((golden_folder / "na_op").glob("2d_*.npz"))
    assert len(paths) >= 10
    for path in paths:
        case = np.load(path)
        meta = json.loads(str(case["meta"]))
        q, k, v = (torch.from_numpy(case[name]) for name in "qkv")
        rpb = torch.from_numpy(case["rpb"]) if "rpb" in case else None
        out = na2d(
            q,
            k,
            v,
            tuple(meta["kernel_size"]),
            dilation=tuple(meta["dilation"]),
            scale=meta["scale"],
            rpb=rpb,
            backend=backend,
        )
        error = (out - torch.from_numpy(case["out"])).abs().max().item()
        assert error <= 2e-6, f"{path.stem}: {error:.1e}"


@st.composite
def problems(draw):
    kernel = draw(st.tuples(st.integers(2, 6), st.integers(2, 6)))
    dilation = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = tuple(k * d + draw(st.integers(0, 9)) for k, d in zip(kernel, dilation, strict=True))
    biased = draw(st.booleans()) and kernel[0] % 2 and kernel[1] % 2
    return draw(st.integers(1, 2)), size, kernel, dilation, draw(st.integers(1, 3)), draw(st.integers(1, 9)), biased


@settings(max_examples=40, deadline=None)
@given(problems())
def test_tiled_equals_reference(problem):
    batch, size, kernel, dilation, heads, dim, biased = problem
    q, k, v, rpb = tensors((batch, *size, heads, dim), kernel, biased, torch.float64, value_dim=dim + 1)
    inputs = [x.requires_grad_() for x in (q, k, v, rpb) if x is not None]
    outputs = [na2d(q, k, v, kernel, dilation=dilation, rpb=rpb, backend=backend) for backend in BACKENDS]
    torch.testing.assert_close(outputs[1], outputs[0])
    weight = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((output * weight).sum(), inputs) for output in outputs]
    torch.testing.assert_close(gradients[1], gradients[0])


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
        ((X, X, X, 1), {}, "kernel_size of at least 2"),
        ((X, X, X, 3), {"dilation": 0}, "dilation of at least 1"),
        ((X, X, X, (3, 3, 3)), {}, "kernel_size as an integer or two"),
        ((X, X, X, 3.0), {}, "kernel_size as an integer or two"),
        ((X, X.half(), X, 3), {}, "one floating-point dtype"),
        ((X.int(), X.int(), X.int(), 3), {}, "one floating-point dtype"),
        ((X, X[:, :7], X, 3), {}, "of one shape"),
        ((X, X, X[..., :1, :], 3), {}, "of one shape"),
        ((X, X, X.to("meta"), 3), {}, "one device"),
        ((X, X, X, 3), {"rpb": torch.zeros(2, 5, 4)}, r"= \[2, 5, 5\]"),
        ((X, X, X, 3), {"rpb": torch.zeros(3, 5, 5)}, r"= \[2, 5, 5\]"),
        ((X, X, X, 4), {"rpb": torch.zeros(2, 7, 7)}, "odd kernel sizes only"),
        ((X, X, X, 3), {"rpb": torch.zeros(2, 5, 5, dtype=torch.float64)}, "rpb in float32"),
        ((X, X, X, 3), {"backend": "natten"}, "no backend 'natten'; it has 'reference'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        na2d(*arguments, **options)
    assert "\n" not in str(error.value)
