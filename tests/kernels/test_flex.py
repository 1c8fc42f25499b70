"""The FlexAttention path of the neighborhood operator: its masks and its mathematics, mostly without compiling."""

import json

import numpy as np
import pytest
import torch
from foveate.kernels import na1d, na2d, na3d, neighborhood_backends
from foveate.kernels.neighborhood import clear_plans, flex
from foveate.kernels.neighborhood.problem import Problem
from foveate.kernels.neighborhood.window import Axis
from torch.nn.attention import flex_attention as torch_flex

pytestmark = pytest.mark.skipif(flex._missing("cpu") is not None, reason=str(flex._missing("cpu")))
OPERATORS = {1: na1d, 2: na2d, 3: na3d}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def uncompiled(monkeypatch):
    """Let FlexAttention compute by torch's own operators, with all scores in memory: the same masks and scores."""
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture
def traced(monkeypatch):
    """Let torch.compile trace FlexAttention, and run the trace as it is: kernels without a C++ compiler's time."""
    torch.compiler.reset()
    kernels = torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex, "_compiled", lambda: kernels)


def test_fixtures(golden_folder, uncompiled):
    paths = sorted((golden_folder / "na_op").glob("[123]d_*.npz"))
    assert len(paths) >= 40
    for path in paths:
        case = np.load(path)
        meta = json.loads(str(case["meta"]))
        q, k, v = (torch.from_numpy(case[name]) for name in "qkv")
        rpb, *more = (torch.from_numpy(case[name]) if name in case else None for name in ("rpb", "add_k", "add_v"))
        settings = {name: tuple(meta[name]) for name in ("kernel_size", "stride", "dilation", "is_causal")}
        scale = meta["scale"] or q.shape[-1] ** -0.5
        extra = {"rpb": rpb, "additional_keys": more[0], "additional_values": more[1], "scale": scale}
        out = OPERATORS[len(meta["spatial"])](q, k, v, **settings, **extra, backend="flex")
        # The operator refuses the log-sum-exp on CPUs, where only the uncompiled mathematics has it.
        axes = tuple(Axis(*axis) for axis in zip(meta["spatial"], *settings.values(), strict=True))
        _, lse = flex._attention(Problem(q, k, v, axes, scale, rpb, *more, True))
        for name, actual in (("out", out), ("lse", lse)):
            error = (actual - torch.from_numpy(case[name])).abs().max().item()
            assert error <= 2e-6, f"{path.stem}: {name} {error:.1e}"


@pytest.mark.parametrize(
    ("axes", "more"),
    [
        (((300, 7, 1, 1, False),), 0),
        (((290, 40, 3, 2, True),), 5),
        (((19, 5, 2, 3, False), (23, 4, 1, 1, True)), 0),
        (((20, 20, 1, 1, False), (21, 21, 1, 1, False)), 130),
        (((4, 2, 1, 2, False), (9, 3, 1, 1, False), (11, 3, 3, 3, False)), 1),
    ],
)
def test_blocks_are_those_of_the_whole_mask(axes, more):
    count = len(flex._BLOCK_LISTS)
    axes = tuple(Axis(*axis) for axis in axes)
    tensors = flex._mask(axes, more, torch.device("cpu"))
    tokens = int(np.prod([axis.length for axis in axes]))
    visible = flex._visible(axes, [tensors[i : i + 3] for i in range(count, len(tensors), 3)])
    whole = torch_flex.create_block_mask(visible, None, None, tokens, tokens + more, device="cpu")
    for i in range(0, count, 2):
        (blocks, indices), expected = (
            tensors[i : i + 2],
            [getattr(whole, name) for name in flex._BLOCK_LISTS[i : i + 2]],
        )
        assert torch.equal(blocks, expected[0])
        listed = torch.arange(indices.shape[-1]) < blocks[..., None]  # what comes after them is never read
        assert torch.equal(indices[listed], expected[1][listed])


def test_masks_are_remembered_until_plans_are_cleared(uncompiled):
    clear_plans()
    x = random(1, 9, 8, 2, 4)
    for _ in range(3):
        na2d(x, x, x, 3, backend="flex")
    na2d(x, x, x, 5, backend="flex")
    assert flex._mask.cache_info().misses == flex._mask.cache_info().currsize == 2
    assert flex._mask.cache_info().maxsize
    clear_plans()
    assert flex._mask.cache_info().currsize == 0


def test_masks_made_in_inference_serve_training():
    clear_plans()
    axes = (Axis(7, 3),)
    with torch.inference_mode():
        tensors = flex._mask(axes, 0, torch.device("cpu"))
    assert not any(x.is_inference() for x in tensors)


def test_never_chosen_by_itself():
    x = random(1, 7, 6, 2, 4)
    report = neighborhood_backends(x, x, x, 3)
    assert report["flex"] == "can run"
    assert list(report).index("flex") > list(report).index("tiled")
    assert neighborhood_backends(x, x, x, 3, backend="flex")["flex"] == "chosen"
    assert neighborhood_backends(x.double(), x.double(), x.double(), 3)["tiled"] == "chosen"


def test_refusals_name_the_reason(monkeypatch):
    x = random(1, 7, 6, 2, 4)

    def refused(message, x=x, **options):
        with pytest.raises(ValueError, match=f"'flex' cannot run here: {message}"):
            na2d(x, x, x, 3, backend="flex", **options)

    refused("it takes float32, float16 and bfloat16; query is torch.float64", x.double())
    refused("it is for CPU and GPU tensors; query is on meta", x.to("meta"))
    refused("it has no gradients on CPUs", x.clone().requires_grad_())
    refused("it has no gradients on CPUs", rpb=torch.zeros(2, 5, 5, requires_grad=True))
    refused("it returns no log-sum-exp on CPUs", return_lse=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused("torch.compile finds no C\\+\\+ compiler 'no-such-compiler'; install one")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    refused("on CPUs it needs AVX2, .*; here is DEFAULT")


def test_refusals_on_gpus(monkeypatch):
    x = random(3, 7, 6, 2, 16)
    assert "at least 16; got 16 and 8" in flex._not_on_gpu(x, x[..., :8])
    reasons = []
    torch.vmap(lambda x: reasons.append(flex._not_on_gpu(x, x)) or x)(x)
    assert "such as vmap" in reasons[0]
    assert flex._not_on_gpu(x, x) is None
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert "needs triton" in flex._missing("cuda")


def test_exported_graphs_do_not_hold_it():
    class Operator(torch.nn.Module):
        def forward(self, x):
            return na2d(x, x, x, 3, backend="flex")

    with pytest.raises(Exception, match="an exported graph must consist of plain operators"):
        torch.export.export(Operator(), (random(1, 7, 6, 2, 4),))


def test_compiled_callers_of_several_sizes(traced):
    compiled = torch.compile(
        lambda q, k, v, rpb: na2d(q, k, v, 3, rpb=rpb, backend="flex"), fullgraph=True, backend="eager"
    )
    rpb = random(2, 5, 5)
    for size in ((9, 7), (8, 11), (6, 5)):
        q, k, v = random(3, 1, *size, 2, 8)
        torch.testing.assert_close(compiled(q, k, v, rpb), na2d(q, k, v, 3, rpb=rpb, backend="reference"))


def test_compiled_callers_take_it_into_their_graph_on_gpus():
    torch.compiler.reset()
    compiled = torch.compile(flex._attention, fullgraph=True, backend="aot_eager")
    rpb, more = random(4, 5, 5), random(2, 1, 3, 2, 16, seed=1)
    for size in ((9, 7), (8, 11)):
        q, (k, v) = random(1, *size, 4, 16), random(2, 1, *size, 2, 16, seed=1)
        axes = tuple(Axis(length, 3, dilation=2) for length in size)
        out, lse = compiled(Problem(q, k, v, axes, 0.3, rpb, *more, True))
        extra = {"additional_keys": more[0], "additional_values": more[1], "rpb": rpb}
        expected = na2d(q, k, v, 3, dilation=2, scale=0.3, **extra, backend="reference", return_lse=True)
        torch.testing.assert_close((out, lse), expected)


def test_gradients_as_on_gpus(monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)  # it refuses gradients on CPUs
    inputs = [random(2, 7, 9, 2, 4, seed=i) for i in range(3)] + [random(2, 9, 5), *random(2, 2, 3, 2, 4)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    q, k, v, rpb, more_k, more_v = inputs
    axes = (Axis(7, 5), Axis(9, 3, dilation=2))
    out, _ = flex._attention(Problem(q, k, v, axes, 0.5, rpb, more_k, more_v, False))
    options = {"dilation": (1, 2), "scale": 0.5, "additional_keys": more_k, "additional_values": more_v}
    expected = na2d(q, k, v, (5, 3), rpb=rpb, **options, backend="reference")
    grads = [torch.autograd.grad((x * random(*x.shape, seed=9)).sum(), inputs) for x in (out, expected)]
    for actual, reference in zip(*grads, strict=True):
        torch.testing.assert_close(actual, reference)


def test_vmap_and_no_grad_and_autocast(uncompiled):
    q, k, v = (random(3, 1, 7, 6, 2, 4, seed=i) for i in range(3))
    rpb = random(3, 2, 5, 5)
    call = lambda q, k, v, rpb: na2d(q, k, v, 3, rpb=rpb, backend="flex")  # noqa: E731
    expected = torch.stack([na2d(*x, 3, rpb=b, backend="reference") for *x, b in zip(q, k, v, rpb, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(q, k, v, rpb), expected)
    torch.testing.assert_close(torch.vmap(call, in_dims=(None, 0, 0, None))(q[2], k, v, rpb[2])[2], expected[2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = call(q[0].requires_grad_(), k[0], v[0], rpb[0])
    torch.testing.assert_close(out, expected[0])


@pytest.mark.heavy
def test_operator_is_registered_properly():
    q, k, v = (random(2, 8, 9, 2, 6, seed=i) for i in range(3))
    axes = [8, 3, 1, 2, 0, 9, 3, 1, 1, 0]
    for arguments in ((q, k, v, random(2, 5, 5), None, None, axes, 0.3), (q, k, v, None, k[:, 0], v[:, 0], axes, 0.3)):
        torch.library.opcheck(flex._operator, arguments)


def test_more_shapes_than_torch_compiles_by_default(traced):
    for length in range(7, 17):
        x = random(1, length, 1, 4)
        torch.testing.assert_close(na1d(x, x, x, 3, backend="flex"), na1d(x, x, x, 3, backend="reference"))


@pytest.mark.heavy
def test_compiled_kernel():
    q, k, v = random(1, 17, 13, 4, 8), random(1, 17, 13, 2, 8, seed=1), random(1, 17, 13, 2, 5, seed=2)
    options = {
        "kernel_size": (5, 3),
        "dilation": (2, 3),
        "rpb": random(4, 9, 5),
        "additional_keys": random(1, 3, 2, 8),
        "additional_values": random(1, 3, 2, 5),
    }
    expected = na2d(q, k, v, **options, backend="reference")
    torch.testing.assert_close(na2d(q, k, v, **options, backend="flex"), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("spatial", "dtype", "options"),
    [
        ((300,), torch.float32, {"kernel_size": 7, "is_causal": True, "stride": 3, "dilation": 2}),
        ((26, 27), torch.float32, {"kernel_size": (25, 27)}),
        ((9, 40), torch.bfloat16, {"kernel_size": (4, 5), "stride": (2, 5)}),
        ((5, 6, 7), torch.float16, {"kernel_size": (2, 3, 3), "is_causal": (True, False, False)}),
    ],
)
def test_compiled_kernels(spatial, dtype, options):
    q, k, v = (random(2, *spatial, 2, 20, seed=i, dtype=dtype) for i in range(3))
    operator = OPERATORS[len(spatial)]
    expected = operator(q.float(), k.float(), v.float(), **options, backend="reference")
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    out = operator(q, k, v, **options, backend="flex")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.heavy
def test_compiled_kernel_in_a_compiled_caller():
    qkv = random(1, 9, 12, 3, 2, 8)
    compiled = torch.compile(lambda x: na2d(*(x * 2).unbind(3), 5, backend="flex") + 1, fullgraph=True)
    torch.testing.assert_close(compiled(qkv), na2d(*(qkv * 2).unbind(3), 5, backend="reference") + 1)


@pytest.mark.heavy
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_kernels_with_all_gradients():
    inputs = [random(2, 19, 23, heads, 32, seed=heads).cuda() for heads in (4, 2, 2)] + [random(4, 5, 9).cuda()]
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for backend in ("flex", "reference"):
        options = {"kernel_size": (3, 5), "dilation": (2, 1), "rpb": inputs[3]}
        out, lse = na2d(*inputs[:3], **options, backend=backend, return_lse=True)
        results.append((out, lse, *torch.autograd.grad((out * random(*out.shape).cuda()).sum() + lse.sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
