"""The unfused operators: NATTEN's values and gradients, all paths alike, and their composition the fused operator."""

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from foveate.kernels import (
    na1d,
    na1d_av,
    na1d_qk,
    na2d,
    na2d_av,
    na2d_qk,
    na3d,
    na3d_av,
    na3d_qk,
)
from foveate.kernels.neighborhood import native, tiled_products, unfused
from foveate.kernels.neighborhood.window import Axis
from hypothesis import given, settings
from hypothesis import strategies as st

FUSED, QK, AV = (na1d, na2d, na3d), (na1d_qk, na2d_qk, na3d_qk), (na1d_av, na2d_av, na3d_av)
needs_library = pytest.mark.skipif(native._library is None, reason=str(native._missing))
NATIVE = pytest.param("native", marks=needs_library)
BACKENDS = (NATIVE, "tiled", "reference")


def heads_last(x):
    return x.movedim(1, -2)


def golden_cases(folder):
    return json.loads((folder / "natten_compat" / "index.json").read_text())["cases"]


def run_case(case, arrays, backend, dtype):
    """Return everything that a fixture holds, in its layout."""
    tensors = {name: torch.from_numpy(arrays[name]).to(dtype) for name in arrays.files if arrays[name].ndim}
    leaves = {
        name: x.requires_grad_()
        for name, x in tensors.items()
        if name in ("query", "key", "value", "rpb", "probs", "additional_keys", "additional_values")
    }
    options = {
        "kernel_size": tuple(case["kernel_size"]),
        "dilation": tuple(case["dilation"]),
        "is_causal": tuple(case["is_causal"]),
        "backend": backend,
    }
    additional = [leaves[n].transpose(1, 2) if n in leaves else None for n in ("additional_keys", "additional_values")]
    i = case["rank"] - 1
    attn = QK[i](
        heads_last(leaves["query"]),
        heads_last(leaves["key"]),
        additional_keys=additional[0],
        rpb=leaves.get("rpb"),
        **options,
    ).movedim(-2, 1)
    out = AV[i](
        heads_last(leaves["probs"]), heads_last(leaves["value"]), additional_values=additional[1], **options
    ).movedim(-2, 1)
    results = {"attn": attn, "out": out}
    pairs = (
        (attn, "grad_attn", ("query", "key", "rpb", "additional_keys")),
        (out, "grad_out", ("probs", "value", "additional_values")),
    )
    for output, cotangent, names in pairs:
        names = [name for name in names if name in leaves]
        grads = torch.autograd.grad(output, [leaves[name] for name in names], tensors[cotangent])
        results |= {f"d_{name}": grad for name, grad in zip(names, grads, strict=True)}
    return results


@pytest.mark.parametrize("backend", BACKENDS)
def test_natten_values_and_gradients(backend, golden_folder):
    cases = golden_cases(golden_folder)
    assert len(cases) >= 13
    for case in cases:
        arrays = np.load(golden_folder / "natten_compat" / f"{case['name']}.npz")
        of_natten = min(versions["fp32"] for versions in case["checked_against"].values() if "fp32" in versions)
        for dtype, tolerance in ((torch.float32, max(4 * of_natten, 2e-6)), (torch.float64, 1e-6)):
            if backend == "native" and dtype == torch.float64:
                continue
            for name, actual in run_case(case, arrays, backend, dtype).items():
                expected = torch.from_numpy(arrays[name]).to(dtype)
                torch.testing.assert_close(
                    actual, expected, atol=tolerance, rtol=1e-6, msg=partial("{} {}: {}".format, case["name"], name)
                )


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 3))
    kernel, dilation, spatial, causal = [], [], [], []
    for _ in range(rank):
        k, d = draw(st.integers(2, 5)), draw(st.integers(1, 3))
        kernel.append(k)
        dilation.append(d)
        spatial.append(draw(st.integers(k * d, k * d + (23 if rank == 1 else 9 if rank == 2 else 3))))
        causal.append(draw(st.booleans()))
    biased = all(k % 2 for k in kernel) and not any(causal)
    return {
        "spatial": tuple(spatial),
        "kernel_size": tuple(kernel),
        "dilation": tuple(dilation),
        "is_causal": tuple(causal),
        "rpb": biased and draw(st.booleans()),
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 3)),
        "dim": draw(st.integers(1, 19)),
        "dim_v": draw(st.integers(1, 19)),
        "more": draw(st.integers(0, 2)),
    }


def make(problem, dtype):
    generator = torch.Generator().manual_seed(0)
    batch, spatial, heads = problem["batch"], problem["spatial"], problem["heads"]

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = {
        "query": randn(batch, *spatial, heads, problem["dim"]),
        "key": randn(batch, *spatial, heads, problem["dim"]),
        "value": randn(batch, *spatial, heads, problem["dim_v"]),
    }
    if problem["rpb"]:
        tensors["rpb"] = randn(heads, *(2 * k - 1 for k in problem["kernel_size"]))
    if problem["more"]:
        tensors["additional_keys"] = randn(batch, problem["more"], heads, problem["dim"])
        tensors["additional_values"] = randn(batch, problem["more"], heads, problem["dim_v"])
    return tensors


def compose(problem, tensors, backend):
    options = {name: problem[name] for name in ("kernel_size", "dilation", "is_causal")} | {"backend": backend}
    i = len(problem["spatial"]) - 1
    scores = QK[i](
        tensors["query"] * 0.3,
        tensors["key"],
        additional_keys=tensors.get("additional_keys"),
        rpb=tensors.get("rpb"),
        **options,
    )
    return AV[i](scores.softmax(-1), tensors["value"], additional_values=tensors.get("additional_values"), **options)


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [pytest.param("native", torch.float32, 2e-5, marks=needs_library), ("tiled", torch.float64, 1e-12)],
)
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_composition_is_the_fused_operator(backend, dtype, tolerance, problem):
    tensors = make(problem, dtype)
    options = {name: problem[name] for name in ("kernel_size", "dilation", "is_causal")}
    out = compose(problem, tensors, backend)
    expected = FUSED[len(problem["spatial"]) - 1](**tensors, **options, scale=0.3, backend="reference")
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    grads = [torch.autograd.grad((x * weight).sum(), list(tensors.values())) for x in (out, expected)]
    for name, actual, wanted in zip(tensors, *grads, strict=True):
        torch.testing.assert_close(
            actual, wanted, atol=10 * tolerance, rtol=10 * tolerance, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_slots_without_a_key_come_last_and_are_ignored(backend):
    q = torch.randn(1, 5, 1, 4)
    scores = na1d_qk(q, q, 3, is_causal=True, backend=backend)
    expected = torch.full((5, 3), float("-inf"))
    for i in range(5):
        keys = q[0, max(i - 2, 0) : i + 1, 0]
        expected[i, : len(keys)] = keys @ q[0, i, 0]
    torch.testing.assert_close(scores[0, :, 0], expected)
    weights = torch.where(scores.isinf(), float("nan"), scores).requires_grad_()
    out = na1d_av(weights, q, 3, is_causal=True, backend=backend)
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert (grad[scores.isinf()] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend):
    dtype = torch.float32 if backend == "native" else torch.float64
    q, k, v = (torch.randn(1, 4, 5, 1, 3, dtype=dtype, requires_grad=True) for _ in range(3))

    def second(backend, q, k, v):
        out = na2d_av(na2d_qk(q, k, 3, backend=backend).tanh(), v, 3, backend=backend)
        first = torch.autograd.grad(out.pow(3).sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v))

    expected = second("reference", *(x.double() for x in (q, k, v)))
    for actual, wanted in zip(second(backend, q, k, v), expected, strict=True):
        torch.testing.assert_close(
            actual.double(),
            wanted,
            rtol=1e-3 if dtype == torch.float32 else 1e-10,
            atol=1e-4 * wanted.abs().max().item(),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [NATIVE, "tiled"])
def test_half_types(backend, dtype):
    q, k, v = (torch.randn(2, 9, 8, 2, 20).to(dtype).requires_grad_() for _ in range(3))
    scores = na2d_qk(q, k, 5, backend=backend)
    out = na2d_av(scores.softmax(-1, dtype=torch.float32), v, 5, backend=backend)
    assert scores.dtype == out.dtype == dtype
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = na2d_av(na2d_qk(*exact[:2], 5).softmax(-1), exact[2], 5)
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    for actual, expected in zip(grads, torch.autograd.grad(wanted.sum(), exact), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=3 * tolerance, rtol=3 * tolerance)


@pytest.mark.parametrize("backend", [NATIVE, "tiled", None])
def test_compiled_vmapped_and_autocast_calls(backend):
    q, k, v = (torch.randn(2, 7, 6, 2, 8, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, 5, requires_grad=True)

    def call(q, k, v, rpb):
        return na2d_av(na2d_qk(q, k, 3, rpb=rpb, backend=backend).softmax(-1), v, 3, backend=backend)

    expected = call(q, k, v, rpb)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, rpb)
    torch.testing.assert_close(compiled, expected)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v, rpb)) for x in (compiled, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    mapped = torch.vmap(lambda q, k, v: call(q[None], k[None], v[None], rpb)[0])(q, k, v)
    torch.testing.assert_close(mapped, expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = call(q, k, v, rpb)
    torch.testing.assert_close(low.float(), expected, atol=0.1, rtol=0.1)


def test_exported_graphs_hold_torchs_operators():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return na2d_av(na2d_qk(q, k, 3, is_causal=(True, False)).softmax(-1), v, 3, is_causal=(True, False))

    tensors = tuple(torch.randn(1, 5, 6, 2, 4) for _ in range(3))
    program = torch.export.export(Module(), tensors)
    assert not any("foveate" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*tensors), Module()(*tensors))


def test_a_graph_of_any_size_is_refused_by_the_operators_names():
    class Module(torch.nn.Module):
        def forward(self, q, rpb):
            return unfused.na2d_bias(rpb, q.shape[1:3], 3)

    free = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    tensors = torch.randn(1, 6, 7, 2, 4), torch.randn(2, 5, 5)
    with pytest.raises(Exception, match=r"na2d_bias\) gather by tables of one size"):
        torch.export.export(Module(), tensors, dynamic_shapes=(free, None), strict=False)


def test_tables_of_exported_graphs_grow_with_a_side_and_not_with_the_map():
    class Module(torch.nn.Module):
        def forward(self, weights, v, rpb):
            bias = unfused.na2d_bias(rpb, (12, 21), (3, 5))
            return bias, na2d_av((weights + bias).softmax(-1), v, (3, 5), dilation=(2, 1))

    tensors = torch.randn(1, 12, 21, 2, 15), torch.randn(1, 12, 21, 2, 4), torch.randn(2, 5, 9)
    program = torch.export.export(Module(), tensors)
    assert max(table.numel() for table in program.constants.values()) == 21 * 5
    torch.testing.assert_close(program.module()(*tensors), Module()(*tensors))


@pytest.mark.parametrize("backend", [NATIVE, "tiled"])
def test_results_lie_in_memory_as_the_inputs_do(backend):
    last = torch.randn(2, 7, 6, 3, 8)
    first = last.movedim(-2, 1).contiguous().movedim(1, -2)
    for x in (last, first):
        scores = na2d_qk(x, x, 3, backend=backend)
        out = na2d_av(scores, x, 3, backend=backend)
        for part in (scores, out):
            assert (part if x is last else part.movedim(-2, 1)).is_contiguous()
    torch.testing.assert_close(out, na2d_av(na2d_qk(last, last, 3), last, 3))


def test_operators_keep_torchs_contract():
    from foveate.kernels.neighborhood import products

    last = torch.randn(1, 5, 2, 4, requires_grad=True)
    weights = torch.randn(1, 5, 2, 3, requires_grad=True)
    first = torch.randn(1, 2, 5, 4).movedim(1, -2).requires_grad_()
    for backend, x in itertools.product(("tiled", "native")[: 1 + (native._library is not None)], (last, first)):
        for operator, other in (
            (products.neighborhood_scores, x),
            (products.neighborhood_values, weights),
            (products.neighborhood_scatter, weights),
        ):
            torch.library.opcheck(operator, (other, x, [5, 3, 1, 1, 0], backend))


X, W = torch.zeros(1, 6, 7, 2, 4), torch.zeros(1, 6, 7, 2, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: na2d_qk(X, X[..., :3], 3), "one shape and dtype"),
        (lambda: na2d_qk(X, X[:, :5], 3), "one .*B, H, W, heads"),
        (lambda: na2d_qk(X, X, 7), "does not fit the height: kernel_size 7 x dilation 1 = 7 > 6"),
        (lambda: na2d_qk(X, X, 3, (1, 3)), "does not fit the width: kernel_size 3 x dilation 3 = 9 > 7"),
        (lambda: na2d_qk(X, X, 1), "kernel_size of at least 2"),
        (lambda: na2d_qk(X, X, 3, is_causal=True, rpb=torch.zeros(2, 5, 5)), "neither with a stride nor on a causal"),
        (lambda: na2d_qk(X, X, 4, rpb=torch.zeros(2, 7, 7)), "odd kernel sizes only"),
        (lambda: na2d_qk(X, X, 3, additional_keys=torch.zeros(1, 2, 3, 4)), r"additional_keys as .* = \[1, N, 2, 4\]"),
        (lambda: na2d_av(W, X, 5), "window's 25 keys and 0 additional ones; got 9"),
        (lambda: na2d_av(W, X, 3, additional_values=torch.zeros(1, 2, 2, 4)), "9 keys and 2 additional ones; got 9"),
        (lambda: na1d_qk(X, X, 3), r"query as \[B, L, heads, ...\]; got 5 axes"),
        (lambda: na2d_qk(X.long(), X.long(), 3), "floating-point"),
        (lambda: na2d_qk(X, X, 3, backend="cuda"), "no backend 'cuda'"),
        (lambda: na2d_qk(X.double(), X.double(), 3, backend="native"), "'native' cannot run here: it takes float32"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_empty_batches():
    assert na2d_qk(X[:0], X[:0], 3).shape == (0, 6, 7, 2, 9)
    assert na2d_av(W[:0], X[:0], 3).shape == (0, 6, 7, 2, 4)


def test_memory_is_tokens_times_window():
    """A map whose scores of all pairs would be 4 GB."""
    q = torch.randn(1, 32768, 1, 4)
    scores = na1d_qk(q, q, 9, backend="tiled")
    assert scores.shape == (1, 32768, 1, 9)
    assert math.isfinite(na1d_av(scores, q, 9, backend="tiled").sum().item())


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_every_instruction_set(lanes, causal):
    if native._library is None or lanes > native._library.lanes:
        pytest.skip("this processor lacks it")
    axes = (Axis(7, 3, is_causal=causal), Axis(19, 4, dilation=2))
    q, x = (torch.randn(2, 7, 19, 3, 21) for _ in range(2))
    weights = torch.randn(2, 7, 19, 3, 12)
    missing = unfused._missing(axes, q.device)
    weights = weights if missing is None else weights.masked_fill(missing, 0)
    for name, first in (("scores", q), ("values", weights), ("scatter", weights)):
        actual = getattr(native, f"native_{name}")(first, x, axes, lanes)
        expected = getattr(tiled_products, name)(first.double(), x.double(), axes)
        if name == "scores" and causal:
            actual, expected = (part.masked_fill(missing, 0) for part in (actual, expected))
        torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=2e-5)
