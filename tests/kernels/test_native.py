"""The C path of the neighborhood operator, for every instruction set of this machine, against the specification."""

import json
import os
import subprocess
import sys
from pathlib import Path

import foveate
import numpy as np
import pytest
import torch
from foveate.kernels import na1d, na2d, na3d, neighborhood_backends
from foveate.kernels.neighborhood import native
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(native._library is None, reason=str(native._missing)),
]
LANES = [lanes for lanes in (16, 8, 4) if native._library and lanes <= native._library.lanes]
OPERATORS = {1: na1d, 2: na2d, 3: na3d}


@pytest.fixture(params=LANES, autouse=True, scope="module")
def lanes(request):
    best, native._library.lanes = native._library.lanes, request.param
    yield request.param
    native._library.lanes = best


@pytest.fixture
def poisoned():
    """Fill new tensors with NaN, so that what is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_fixtures(golden_folder):
    for path in sorted((golden_folder / "na_op").glob("[123]d_*.npz")):
        case = np.load(path)
        meta = json.loads(str(case["meta"]))
        extra = {"rpb": "rpb", "additional_keys": "add_k", "additional_values": "add_v"}
        out, lse = OPERATORS[len(meta["spatial"])](
            *(torch.from_numpy(case[name]) for name in "qkv"),
            **{name: tuple(meta[name]) for name in ("kernel_size", "stride", "dilation", "is_causal")},
            **{name: torch.from_numpy(case[key]) for name, key in extra.items() if key in case},
            scale=meta["scale"],
            backend="native",
            return_lse=True,
        )
        for name, actual in (("out", out), ("lse", lse)):
            error = (actual - torch.from_numpy(case[name])).abs().max().item()
            assert error <= 2e-6, f"{path.stem}: {name} {error:.1e}"


@st.composite
def problems(draw):
    """Draw shapes and options of a call of any rank, with maps of several vectors, and vectors of several planes."""
    rank = draw(st.integers(1, 3))
    per_axis = lambda values: tuple(draw(values) for _ in range(rank))  # noqa: E731
    kernel = per_axis(st.integers(2, (9, 7, 3)[rank - 1]))
    dilation = per_axis(st.integers(1, 3 if rank < 3 else 2))
    more = (120, 25, 6)[rank - 1]
    size = tuple(k * d + draw(st.integers(0, more)) for k, d in zip(kernel, dilation, strict=True))
    options = {"kernel_size": kernel, "dilation": dilation}
    biased = draw(st.booleans()) and all(k % 2 for k in kernel)
    if not biased:
        options |= {"stride": tuple(draw(st.integers(1, k)) for k in kernel), "is_causal": per_axis(st.booleans())}
    batch, heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    dim, dim_v = draw(st.sampled_from([1, 3, 8, 16, 20, 32])), draw(st.sampled_from([1, 5, 16, 24]))
    shapes = {
        "query": (batch, *size, heads_kv * group, dim),
        "key": (batch, *size, heads_kv, dim),
        "value": (batch, *size, heads_kv, dim_v),
    }
    if biased:
        shapes["rpb"] = (heads_kv * group, *(2 * k - 1 for k in kernel))
    return shapes, options


@settings(max_examples=100, deadline=None)
@given(problems())
def test_equals_reference_with_all_gradients(problem):
    shapes, options = problem
    inputs = {name: random(*shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}
    results = []
    for backend, dtype in (("reference", torch.float64), ("native", torch.float32)):
        cast = {name: x.to(dtype) for name, x in inputs.items()}
        outputs = OPERATORS[len(options["kernel_size"])](**cast, **options, backend=backend, return_lse=True)
        loss = sum((x * random(*x.shape, seed=1, dtype=torch.float64)).sum() for x in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, list(inputs.values()))))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5 * (1 + expected.abs().max().item()))


@pytest.mark.parametrize(("kernel_size", "dilation"), [(7, 1), ((3, 5), (4, 3))])
def test_nothing_stays_unwritten_and_threads_change_no_bit(kernel_size, dilation, poisoned, threads):
    q, k, v = random(3, 23, 37, 3, 3, 20, seed=2).unbind(-3)
    kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    inputs = [x.requires_grad_() for x in (q.clone(), k.clone(), v.clone(), random(3, *(2 * n - 1 for n in kernel)))]
    results = []
    for count in (1, 2, 5):
        threads(count)
        out, lse = na2d(*inputs[:3], kernel, 1, dilation, rpb=inputs[3], backend="native", return_lse=True)
        grads = torch.autograd.grad((out * random(*out.shape)).sum() + lse.sum(), inputs)
        results.append((out, lse, *grads[:3]))
        again = torch.autograd.grad((na2d(*inputs[:3], kernel, rpb=inputs[3], backend="native") ** 2).sum(), inputs)
        twice = torch.autograd.grad((na2d(*inputs[:3], kernel, rpb=inputs[3], backend="native") ** 2).sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(again, twice, strict=True))
        assert grads[3].isfinite().all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(x.isfinite().all() for x in results[0])


def test_threads_without_openmp(monkeypatch, threads):
    x = random(2, 40, 19, 4, 8)
    expected = na2d(x, x, x, 5, backend="native")
    monkeypatch.setattr(native._library, "parallel", 0)
    threads(3)
    assert torch.equal(na2d(x, x, x, 5, backend="native"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_the_result(dtype):
    q, k, v = (random(2, 13, 18, 2, 19, seed=i).to(dtype) for i in range(3))
    out = na2d(q, k, v, 5, backend="native")
    assert torch.equal(out, na2d(q.float(), k.float(), v.float(), 5, backend="native").to(dtype))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(na2d(*inputs, 5, backend="native").float().sin().sum(), inputs)
    exact = torch.autograd.grad(na2d(*(x.float() for x in inputs), 5, backend="native").sin().sum(), inputs)
    for grad, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad.float(), expected.float(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_passes_unchanged(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    numbers = numbers[: len(numbers) // 4 * 4].view(1, 2, 2, 1, -1)
    q = torch.zeros(1, 2, 2, 1, 1, dtype=dtype)
    k = q.clone()
    # Every query weighs the key of one position by 1 and the others by 0.
    for i in range(4):
        k.view(-1)[:], k.view(-1)[i] = -200, 200
        out = na2d(q + 200, k, numbers, 2, scale=1.0, backend="native")
        assert torch.equal(out[0, 0, 1, 0], numbers.view(4, -1)[i])


def test_weights_are_as_exact_as_float32():
    scores = torch.linspace(-80, 0, 1001).double()
    for shift in (0.0, 40.0):
        x = (scores + shift).float().view(1, -1, 1, 1)
        lse = na1d(torch.ones_like(x)[:, :2], x[:, :2], x[:, :2], 2, scale=1.0, backend="native", return_lse=True)[1]
        torch.testing.assert_close(lse[0, 0, 0].double(), x[0, :2, 0, 0].double().logsumexp(0), rtol=2e-7, atol=2e-7)
    pairs = torch.stack([torch.zeros(1001), torch.linspace(-20, 0, 1001)], 1).view(1001, 2, 1, 1)
    values = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1001, -1, -1, -1)
    weights = na1d(torch.ones_like(pairs), pairs, values, 2, scale=1.0, backend="native")[:, 0, 0, 0]
    expected = pairs[:, :, 0, 0].double().softmax(-1)[:, 1]
    exact_score = 1 + pairs[:, 1, 0, 0].abs().double()  # a score's own rounding is relative to the score
    assert ((weights / expected - 1).abs() / exact_score).max() < 2e-7


def test_keys_out_of_the_window_have_no_influence():
    q, k, v = (random(1, 19, 24, 3, 8, seed=i) for i in range(3))
    expected = na2d(q, k, v, (5, 3), (2, 1), (2, 3), backend="native")
    for bad in (float("nan"), float("inf")):
        seen = torch.zeros(1, 19, 24, 3, 1, dtype=torch.float64)
        seen[:, 0, 1] = seen[:, 18, 23] = 1
        k2, v2 = (torch.where(seen > 0, bad, x) for x in (k, v))
        touched = na2d(q.double(), k.double(), seen, (5, 3), (2, 1), (2, 3), backend="reference")[..., 0] > 0
        out = na2d(q, k2, v2, (5, 3), (2, 1), (2, 3), backend="native")
        assert not out[touched].isfinite().any()
        assert torch.equal(out[~touched], expected[~touched])


def test_scores_of_minus_infinity_and_of_any_size():
    q, k, v, rpb = random(1, 9, 11, 2, 8), random(1, 9, 11, 2, 8), random(1, 9, 11, 2, 8), random(2, 5, 5)
    rpb[:, ::2] = -torch.inf
    torch.testing.assert_close(na2d(q, k, v, 3, rpb=rpb), na2d(q, k, v, 3, rpb=rpb, backend="reference"))
    torch.testing.assert_close(na2d(q * 300, k, v, 3), na2d(q * 300, k, v, 3, backend="reference"), atol=2e-4, rtol=0)


def test_long_axes_and_large_windows_are_cut_into_parts():
    q, k, v = (random(1, 9000, 1, 16, seed=i) for i in range(3))
    options = {"kernel_size": 301, "dilation": 3}
    out = na1d(q, k, v, **options, backend="native")
    torch.testing.assert_close(out, na1d(q, k, v, **options, backend="tiled"), atol=2e-6, rtol=1e-5)
    q, k, v = (random(1, 40, 130, 1, 64, seed=i).requires_grad_() for i in range(3))
    grads = [
        torch.autograd.grad(na2d(q, k, v, 33, backend=name).sin().sum(), (q, k, v)) for name in ("native", "tiled")
    ]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_operator_is_registered_properly():
    q, k, v = (random(2, 8, 9, 2, 6, seed=i).requires_grad_() for i in range(3))
    rpb = random(2, 5, 5).requires_grad_()
    axes = [8, 3, 1, 2, 0, 9, 3, 1, 1, 0]
    for arguments in ((q, k, v, rpb, axes, 0.3, True), (q, k[..., :1, :], v[..., :1, :], None, axes, 0.3, False)):
        torch.library.opcheck(native._operator, arguments)
    compiled = torch.compile(
        lambda *x: na2d(*x[:3], 3, rpb=x[3], backend="native"), fullgraph=True, backend="aot_eager"
    )
    results = []
    for call in (compiled, lambda *x: na2d(*x[:3], 3, rpb=x[3], backend="native")):
        out = call(q, k, v, rpb)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, rpb))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_over_every_tensor():
    q, k, v = (random(3, 2, 7, 8, 2, 4, seed=i) for i in range(3))
    rpb = random(3, 2, 5, 5)
    call = lambda q, k, v, rpb: na2d(q, k, v, 3, rpb=rpb, backend="native")  # noqa: E731
    expected = torch.stack([call(*x) for x in zip(q, k, v, rpb, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(q, k, v, rpb), expected)
    shared = torch.vmap(call, in_dims=(1, None, 1, None))(q.transpose(0, 1), k[0], v.transpose(0, 1), rpb[0])
    torch.testing.assert_close(shared[2], call(q[2], k[0], v[2], rpb[0]))


def test_second_derivative_is_refused_with_the_way_out():
    x = random(1, 5, 5, 1, 4).requires_grad_()
    (grad,) = torch.autograd.grad(na2d(x, x, x, 3, backend="native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='tiled'"):
        grad.sum().backward()


def test_exported_graphs_hold_plain_torch_only():
    class Operator(torch.nn.Module):
        def forward(self, x):
            return na2d(x, x, x, 3)

    x = random(1, 7, 6, 2, 4)
    program = torch.export.export(Operator(), (x,))
    assert not [node for node in program.graph.nodes if "foveate" in str(node.target)]
    torch.testing.assert_close(program.module()(x), na2d(x, x, x, 3))


def test_reasons_are_told(monkeypatch):
    x = random(1, 7, 6, 2, 4)
    assert neighborhood_backends(x, x, x, 3)["native"] == "chosen"
    report = neighborhood_backends(x.double(), x.double(), x.double(), 3)
    assert "takes float32, float16 and bfloat16" in report["native"]
    assert report["tiled"] == "chosen"
    with pytest.raises(ValueError, match=r"'native' cannot run here: it takes float32.*float64"):
        na2d(x.double(), x.double(), x.double(), 3, backend="native")
    monkeypatch.setattr(native, "_missing", "no C compiler was found when foveate was installed")
    report = neighborhood_backends(x, x, x, 3)
    assert "no C compiler" in report["native"]
    assert report["tiled"] == "chosen"


def test_install_without_a_compiler_succeeds(tmp_path, lanes):
    if lanes != LANES[0]:
        pytest.skip("the same for every instruction set")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp"]
    root = Path(foveate.__file__).parent
    environment = os.environ | {"CC": "no-such-compiler"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("_native*"))
