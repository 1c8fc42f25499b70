"""The triton path, interpreted on the CPU; `test_triton_neighborhood.py` runs this file with ``TRITON_INTERPRET=1``."""

import json

import numpy as np
import pytest
import torch
from foveate.kernels import na1d, na2d, na3d, neighborhood_backends
from foveate.kernels.neighborhood import triton_ops, triton_tiles
from foveate.kernels.triton_launch import TileSize

OPERATORS = (na1d, na2d, na3d)


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut small maps into many tiles and boxes."""
    monkeypatch.setattr(triton_tiles, "INTERPRETED", TileSize(2048, 16, 16, 1, 1))
    triton_tiles.kernel_shape.cache_clear()
    yield
    triton_tiles.kernel_shape.cache_clear()


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fill what a kernel writes with NaN before, so that what it leaves unwritten shows."""
    run = triton_ops._run
    written = {
        "forward_kernel": ("out", "lse"),
        "backward_query_kernel": ("delta", "grad_query", "grad_rpb"),
        "backward_key_value_kernel": ("grad_key", "grad_value"),
    }

    def poison(launch, device):
        for name in written[launch.kernel]:
            if name != "grad_rpb" or launch.options["BIAS_GRAD"]:
                launch.arguments[name].fill_(float("nan"))
        run(launch, device)

    monkeypatch.setattr(triton_ops, "_run", poison)


def inputs(spatial, kernel_size, heads=1, heads_kv=None, dim=4, dim_v=None, batch=1, rpb=False, more=0):
    generator = torch.Generator().manual_seed(0)
    heads_kv, dim_v = heads_kv or heads, dim_v or dim
    shapes = {
        "query": (batch, *spatial, heads, dim),
        "key": (batch, *spatial, heads_kv, dim),
        "value": (batch, *spatial, heads_kv, dim_v),
    }
    if rpb:
        shapes["rpb"] = (heads, *(2 * k - 1 for k in kernel_size))
    if more:
        shapes |= {
            "additional_keys": (batch, more, heads_kv, dim),
            "additional_values": (batch, more, heads_kv, dim_v),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def outputs_and_gradients(tensors, backend, **options):
    tensors = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    operator = OPERATORS[tensors["query"].ndim - 4]
    out, lse = operator(**tensors, **options, backend=backend, return_lse=True)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    loss = loss + (lse * torch.linspace(1, -1, lse.numel()).view_as(lse)).sum()
    return dict(
        zip(("out", "lse", *tensors), (out, lse, *torch.autograd.grad(loss, list(tensors.values()))), strict=True)
    )


CASES = {
    "line": ((23,), (5,), {}, {}),
    "line, causal": ((13,), (4,), {"is_causal": True}, {"heads": 2, "heads_kv": 1}),
    "line, causal and strided": ((19,), (4,), {"is_causal": True, "stride": 3, "dilation": 2}, {}),
    "line, strided, groups of different length": ((17,), (5,), {"stride": 3, "dilation": 2}, {}),
    "line, biased": ((21,), (5,), {"dilation": 2}, {"rpb": True, "heads": 2}),
    "map, blocked": ((8, 6), (4, 3), {"stride": (4, 3)}, {"dim": 20}),
    "map, biased": ((7, 9), (3, 5), {}, {"rpb": True, "batch": 2}),
    "map, biased and dilated": ((7, 9), (3, 3), {"dilation": (2, 1)}, {"rpb": True, "heads": 2, "heads_kv": 1}),
    "map, one axis causal": ((5, 9), (4, 2), {"is_causal": (True, False), "stride": (2, 1)}, {"dim_v": 17}),
    "map, whole": ((6, 5), (6, 5), {"scale": 0.3}, {"more": 3}),
    "volume": ((3, 4, 5), (2, 3, 2), {"dilation": (1, 1, 2), "is_causal": (True, False, False)}, {}),
    "volume, biased": ((3, 3, 4), (3, 3, 3), {}, {"rpb": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_the_reference(case):
    spatial, kernel_size, options, tensors = CASES[case]
    tensors = inputs(spatial, kernel_size, **tensors)
    expected = outputs_and_gradients(tensors, "reference", kernel_size=kernel_size, **options)
    actual = outputs_and_gradients(tensors, "triton", kernel_size=kernel_size, **options)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, atol=5e-6, rtol=5e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_walks_over_many_boxes(small_tiles):
    tensors = inputs((9, 7), (5, 7), rpb=True)
    results = [outputs_and_gradients(tensors, backend, kernel_size=(5, 7)) for backend in ("triton", "reference")]
    for name, actual in results[0].items():
        torch.testing.assert_close(actual, results[1][name], atol=5e-6, rtol=5e-6)


def test_fixtures(golden_folder):
    paths = sorted((golden_folder / "na_op").glob("[123]d_*.npz"))
    assert len(paths) >= 40
    for path in paths:
        case = np.load(path)
        meta = json.loads(str(case["meta"]))
        q, k, v = (torch.from_numpy(case[name]) for name in "qkv")
        extra = [torch.from_numpy(case[name]) if name in case else None for name in ("rpb", "add_k", "add_v")]
        out, lse = OPERATORS[len(meta["spatial"]) - 1](
            q,
            k,
            v,
            **{name: tuple(meta[name]) for name in ("kernel_size", "stride", "dilation", "is_causal")},
            scale=meta["scale"],
            rpb=extra[0],
            additional_keys=extra[1],
            additional_values=extra[2],
            backend="triton",
            return_lse=True,
        )
        for name, actual in (("out", out), ("lse", lse)):
            error = (actual - torch.from_numpy(case[name])).abs().max().item()
            assert error <= 2e-6, f"{path.stem}: {name} {error:.1e}"


def test_half_precision_sums_in_float32():
    tensors = {name: x.half() for name, x in inputs((7, 5), (3, 3), dim=16, rpb=True).items()}
    exact = outputs_and_gradients({name: x.float() for name, x in tensors.items()}, "reference", kernel_size=3)
    rounded = outputs_and_gradients(tensors, "triton", kernel_size=3)
    for name, x in exact.items():
        assert rounded[name].dtype == (torch.float32 if name == "lse" else torch.float16)
        torch.testing.assert_close(rounded[name].float(), x, atol=4e-3, rtol=4e-3)


def test_strided_inputs_are_read_where_they_lie():
    qkv = torch.randn(1, 5, 6, 3, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for backend in ("reference", "triton"):
        out = na2d(*qkv.unbind(3), 3, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        backwards = na2d(*(x.flip(-1).movedim(-1, 1).movedim(1, -1) for x in qkv.unbind(3)), 3, backend=backend)
        results[-1] += (backwards,)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=5e-6, rtol=5e-6)


def test_same_bits_in_every_run():
    tensors = inputs((5, 6), (3, 3), rpb=True)
    first, second = (outputs_and_gradients(tensors, "triton", kernel_size=3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_interpreter_runs_on_request_only():
    x = torch.zeros(1, 5, 5, 1, 4)
    report = neighborhood_backends(x, x, x, 3)
    assert report["triton"] == "can run"
    assert neighborhood_backends(x, x, x, 3, backend="triton")["triton"] == "chosen"


def test_operators_keep_torchs_contract():
    tensors = inputs((7,), (3,), rpb=True)
    tensors = [x.requires_grad_() for x in tensors.values()]
    axes = [7, 3, 1, 1, 0]
    torch.library.opcheck(triton_ops.neighborhood_triton_op, (*tensors, axes, 0.5))
    torch.library.opcheck(
        triton_ops.neighborhood_triton_op, (*tensors[:3], None, axes, 0.5), {}, test_utils="test_schema"
    )
    out, lse = triton_ops.neighborhood_triton_op(*tensors, axes, 0.5)
    gradient = (out.detach(), None, *(x.detach() for x in (*tensors, out, lse)), axes, 0.5, True)
    torch.library.opcheck(
        triton_ops.neighborhood_triton_backward_op, gradient, test_utils=("test_schema", "test_faketensor")
    )


def test_compiled_and_vmapped_calls_equal_eager_ones():
    tensors = inputs((9,), (3,), rpb=True, batch=2)
    q, k, v, rpb = tensors.values()
    call = lambda q, k, v, rpb: na1d(q, k, v, 3, rpb=rpb, backend="triton")  # noqa: E731
    expected = call(q, k, v, rpb)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (q, k, v, rpb)]
    actual = compiled(*leaves)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(actual.square().sum(), leaves)
    for a, b in zip(gradients, torch.autograd.grad(call(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    one_by_one = torch.vmap(lambda q, k, v, rpb: call(q[None], k[None], v[None], rpb)[0], in_dims=(0, 0, 0, None))
    torch.testing.assert_close(one_by_one(q, k, v, rpb), expected)
    biases = torch.stack([rpb, 2 * rpb])
    each = torch.vmap(call, in_dims=(None, None, None, 0))(q, k, v, biases)
    torch.testing.assert_close(each, torch.stack([call(q, k, v, bias) for bias in biases]))


def test_only_the_log_sum_exp_is_differentiated():
    tensors = {name: x.requires_grad_() for name, x in inputs((7,), (3,)).items()}
    grads = []
    for backend in ("reference", "triton"):
        _, lse = na1d(**tensors, kernel_size=3, backend=backend, return_lse=True)
        grads.append(torch.autograd.grad(lse.square().sum(), (tensors["query"], tensors["key"])))
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, atol=5e-6, rtol=5e-6)


def test_bfloat16_is_refused_by_the_interpreter():
    x = torch.zeros(1, 5, 5, 1, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="'triton' cannot run here: triton's interpreter multiplies bfloat16"):
        na2d(x, x, x, 3, backend="triton")
