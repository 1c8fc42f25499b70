"""Depthwise convolutions: every path is torch's own, forward and for every gradient, and the choice among them."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks.depthwise import apply_depthwise
from foveate.kernels import depthwise_backends, depthwise_conv2d, depthwise_native, onednn
from foveate.kernels.depthwise import compiled_depthwise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

pytestmark = pytest.mark.versions

BACKENDS = ("interleaved", "channels_last")
CHANNELS_LAST = torch.channels_last
needs_library = pytest.mark.skipif(depthwise_native.obstacle() is not None, reason=str(depthwise_native.obstacle()))


def tensors(batch, channels, size, kernel, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, channels, *size), (channels, 1, *kernel), (channels,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(function, *args):
    leaves = [x.clone().requires_grad_() for x in args]
    out = function(*leaves)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return out, *torch.autograd.grad(out, leaves, upstream)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    channels_last=st.booleans(),
)
def test_every_backend_is_torchs_own(size, kernel, dilation, padding, batch, channels, channels_last):
    x, weight, bias = tensors(batch, channels, size, kernel)
    if channels_last:
        x = x.contiguous(memory_format=CHANNELS_LAST)
    fits = all(n + 2 * p > d * (k - 1) for n, k, d, p in zip(size, kernel, dilation, padding, strict=True))
    for backend in ("convolution",) if dilation == (1, 1) else ("convolution", "interleaved"):
        options = {"dilation": dilation, "padding": padding, "backend": backend}
        if not fits:
            with pytest.raises(ValueError, match="does not fit into a map of"):
                depthwise_conv2d(x, weight, bias, **options)
            continue
        actual = with_gradients(lambda *a, o=options: depthwise_conv2d(*a, **o), x, weight, bias)
        expected = with_gradients(
            lambda *a: F.conv2d(*a, padding=padding, dilation=dilation, groups=channels), x, weight, bias
        )
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    padding=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 16, 64, 70, 131]),
    memory_format=st.sampled_from([torch.contiguous_format, CHANNELS_LAST]),
    residual=st.booleans(),
    act=st.sampled_from([None, "gelu"]),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_gradients_of_trained_weights(size, kernel, padding, batch, channels, memory_format, residual, act, stride):
    padding = tuple(min(p, k - 1) for p, k in zip(padding, kernel, strict=True))
    if residual := residual and stride == (1, 1):
        kernel = [k | 1 for k in kernel]
        padding = tuple(k // 2 for k in kernel)
    if any(n + 2 * p < k for n, k, p in zip(size, kernel, padding, strict=True)):
        return
    exact = tensors(batch, channels, size, kernel)
    options = {"padding": padding, "residual": residual, "activation": act, "stride": stride}
    expected = with_gradients(lambda *a: depthwise_conv2d(*a, backend="convolution", **options), *exact)
    x, weight, bias = (t.float() for t in exact)
    x = x.contiguous(memory_format=memory_format)
    actual = with_gradients(lambda *a: depthwise_conv2d(*a, backend="trained", **options), x, weight, bias)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5 * max(1, theirs.abs().max().item()), rtol=0)


@needs_library
def test_what_autograd_asks_of_trained_weights():
    """Gradients wherever they lie, of some operands alone, many at once, and of gradients."""
    x, weight, bias = (t.float() for t in tensors(2, 70, (9, 6), (5, 5)))
    maps = F.pad(x, (0, 0, 0, 0, 1, 2)).contiguous(memory_format=CHANNELS_LAST)[:, 1:71].requires_grad_()
    assert maps.stride(1) == 1
    weight.requires_grad_(), bias.requires_grad_()
    options = {"padding": 2, "backend": "trained"}

    def gradients(leaves, backend="trained", **how):
        out = depthwise_conv2d(maps, weight, bias, backend=backend)
        return torch.autograd.grad(out.square().sum(), leaves, **how)  # its gradient lies in memory as the output does

    def check(actual, expected):
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)

    for leaves in ((maps,), (weight,), (bias,), (weight, bias), (maps, weight, bias)):
        check(gradients(leaves), gradients(leaves, "convolution"))
    out, expected = depthwise_conv2d(maps, weight, bias, **options), depthwise_conv2d(maps, weight, bias, 1, 2)
    constant = torch.ones(()).expand_as(out)  # of strides 0
    check(torch.autograd.grad(out, weight, constant), torch.autograd.grad(expected, weight, constant))
    many = torch.randn(3, *out.shape)
    outs = [depthwise_conv2d(maps, weight, bias, backend=backend) for backend in ("trained", "convolution")]
    check(*(torch.autograd.grad(out, (maps, weight, bias), many, is_grads_batched=True) for out in outs))
    twice = []
    for backend in ("trained", "convolution"):
        first = gradients((maps, weight, bias), backend, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), (maps, weight, bias)))
    check(*twice)


# Rows and columns that are the first and the last at once, and more columns than are walked before the channels change.
SQUARE_SIZES = [(16, (1, 9)), (16, (9, 1)), (32, (2, 2)), (48, (7, 7)), (64, (5, 80)), (272, (4, 40))]


@needs_library
@pytest.mark.parametrize(("channels", "size"), SQUARE_SIZES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
def test_all_gradients_of_a_3x3_kernel_are_made_at_once(channels, size, memory_format, monkeypatch):
    taken, square_gradients = [], depthwise_native.square_gradients

    def watched(*operands):
        taken.append(operands)
        return square_gradients(*operands)

    monkeypatch.setattr(depthwise_native, "square_gradients", watched)
    exact = tensors(3, channels, size, (3, 3))
    x, weight, bias = (t.float() for t in exact)
    x = x.contiguous(memory_format=memory_format)
    for operands in (slice(0, 3), slice(0, 2)):
        expected = with_gradients(lambda *a: F.conv2d(*a, padding=1, groups=channels), *exact[operands])
        actual = with_gradients(lambda *a: depthwise_conv2d(*a, backend="trained"), *(x, weight, bias)[operands])
        assert actual[1].is_contiguous(memory_format=memory_format)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=1e-5 * max(1, theirs.abs().max().item()), rtol=0)
    assert len(taken) == 2


@needs_library
def test_the_choice_of_gradients_at_once():
    x, weight = torch.randn(1, 32, 9, 9), torch.randn(32, 1, 3, 3, requires_grad=True)
    assert depthwise_backends(x, weight)["convolution"] == "chosen"
    x = x.contiguous(memory_format=CHANNELS_LAST)
    assert depthwise_backends(x, weight)["trained"] == "chosen"
    assert depthwise_backends(x, weight, stride=2)["convolution"] == "chosen"
    assert depthwise_backends(x, weight, padding=0)["convolution"] == "chosen"
    few = x[:, :24].contiguous(memory_format=CHANNELS_LAST)  # no vectors of them
    assert depthwise_backends(few, weight[:24])["convolution"] == "chosen"


@needs_library
def test_the_choice_of_trained_weights():
    x, weight = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 5, 5, requires_grad=True)
    assert depthwise_backends(x, weight)["trained"] == "chosen"
    assert depthwise_backends(x, weight[..., 1:4])["convolution"] == "chosen"  # of which oneDNN has code
    assert depthwise_backends(x[:, :, :4], weight[..., 1:4])["trained"] == "chosen"
    assert depthwise_backends(x, weight.detach())["convolution"] == "chosen"
    assert "padding is wider" in depthwise_backends(x, weight, padding=5)["trained"]
    assert "is dilated" in depthwise_backends(x, weight, dilation=2)["trained"]
    assert "float32 on CPUs" in depthwise_backends(x.double(), weight.double())["trained"]
    assert "nothing empty" in depthwise_backends(x[:0], weight)["trained"]
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_backends(x, weight)["convolution"] == "chosen"
    torch.func.grad(lambda w: depthwise_conv2d(x, w).sum())(weight.detach())
    compiled = torch.compile(depthwise_conv2d, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), depthwise_conv2d(x, weight))


# Odd sizes, sizes below the kernel, and maps of one pixel, at the kernels of VAN, MSCAN and OverLoCK.
SIZES = [(56, 56), (13, 8), (5, 3), (1, 1), (1, 30)]
KERNELS = [((7, 7), 3), ((1, 21), 1), ((21, 1), 1), ((17, 17), 1), ((3, 3), 7)]


@pytest.mark.parametrize(("kernel", "dilation"), KERNELS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
def test_the_chosen_path_is_torchs_own_in_float32(kernel, dilation, memory_format):
    for size in SIZES:
        x, weight, bias = tensors(2, 20, size, kernel, torch.float32)
        padding = [k // 2 * dilation for k in kernel]
        expected = with_gradients(
            lambda *a, p=padding: F.conv2d(*a, padding=p, dilation=dilation, groups=20),
            *(t.double() for t in (x, weight, bias)),
        )
        x = x.contiguous(memory_format=memory_format)
        actual = with_gradients(lambda *a: depthwise_conv2d(*a, dilation=dilation), x, weight, bias)
        assert actual[0].is_contiguous(memory_format=memory_format)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("kernel", "dilation"), KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_far_as_the_kernel(kernel, dilation, value):
    x, weight, bias = tensors(1, 4, (23, 26), kernel, torch.float32)
    x[0, 2, 11, 12] = value
    expected = F.conv2d(x, weight, bias, padding=[k // 2 * dilation for k in kernel], dilation=dilation, groups=4)
    for layout in (x, x.contiguous(memory_format=CHANNELS_LAST)):
        actual = depthwise_conv2d(layout, weight, bias, dilation)
        assert actual.isfinite().equal(expected.isfinite())
        assert not actual[0, 2].isfinite().all()
        assert actual[0, [0, 1, 3]].isfinite().all()


def test_the_choice():
    x = torch.zeros(1, 8, 9, 9)
    last = x.contiguous(memory_format=CHANNELS_LAST)
    wide = {"fast": "convolution"} if not torch.backends.mkldnn.is_available() else {}

    def chosen(x, kernel, **options):
        return next(n for n, v in depthwise_backends(x, torch.zeros(8, 1, *kernel), **options).items() if v == "chosen")

    for map_ in (x, last, x.bfloat16()):
        assert chosen(map_, (7, 7), dilation=3) == wide.get("fast", "interleaved")
        assert chosen(map_, (3, 3), dilation=3) == chosen(map_, (5, 5)) == "convolution"
    assert chosen(x, (1, 21)) == chosen(x, (17, 17)) == wide.get("fast", "channels_last")
    assert chosen(last, (1, 21)) == chosen(x, (21, 1)) == chosen(x.bfloat16(), (1, 21)) == "convolution"
    assert chosen(x.to("meta"), (7, 7), dilation=3) == "convolution"
    assert chosen(x, (7, 7), dilation=3, backend="convolution") == "convolution"
    with pytest.raises(ValueError, match="'interleaved' cannot run here: the kernel is not dilated"):
        chosen(x, (7, 7), backend="interleaved")


@pytest.mark.parametrize("kernel", [((3, 3), 1), ((5, 3), 1), ((3, 3), 2), ((7, 7), 3), ((1, 21), 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
def test_what_follows_a_convolution(kernel, memory_format):
    kernel, dilation = kernel
    for size, residual, activation in product([(14, 9), (1, 5)], (False, True), (None, "gelu")):
        tensors_ = tensors(2, 20, size, kernel)
        options = {"dilation": dilation, "residual": residual, "activation": activation}
        expected = with_gradients(lambda *a, o=options: depthwise_conv2d(*a, **o, backend="convolution"), *tensors_)
        plain = F.conv2d(*tensors_, padding=[k // 2 * dilation for k in kernel], dilation=dilation, groups=20)
        plain = plain + tensors_[0] if residual else plain
        torch.testing.assert_close(expected[0], F.gelu(plain) if activation else plain)
        x, weight, bias = (t.float() for t in tensors_)
        x = x.contiguous(memory_format=memory_format)
        for backend, report in depthwise_backends(x, weight, bias, **options).items():
            if report not in ("chosen", "can run"):
                continue
            out = depthwise_conv2d(x, weight, bias, **options, backend=backend)
            assert out.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=1e-5)
            if backend in ("onednn", "trained"):  # float32 alone; the second by itself below
                continue
            gradients = with_gradients(lambda *a, o=options, b=backend: depthwise_conv2d(*a, **o, backend=b), *tensors_)
            torch.testing.assert_close(gradients, expected)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no products of bfloat16 here")
@torch.inference_mode()
def test_bfloat16_is_fused_without_the_map():
    x, weight, bias = (t.bfloat16() for t in tensors(2, 20, (14, 9), (3, 3), torch.float32))
    x = x.contiguous(memory_format=CHANNELS_LAST)
    assert depthwise_backends(x, weight, bias, activation="gelu")["onednn"] == "chosen"
    exact = F.gelu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=20))
    out = depthwise_conv2d(x, weight, bias, activation="gelu")
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=2**-7)
    assert "lost beside the 1" in depthwise_backends(x, weight, bias, activation="gelu", residual=True)["onednn"]


def test_the_choice_of_what_is_fused():
    x = torch.randn(1, 8, 9, 9).contiguous(memory_format=CHANNELS_LAST)
    weight = torch.randn(8, 1, 3, 3, requires_grad=True)
    assert "has no derivatives" in depthwise_backends(x, weight, activation="gelu")["onednn"]
    with torch.no_grad():
        if torch.backends.mkldnn.is_available():
            assert depthwise_backends(x, weight, activation="gelu")["onednn"] == "chosen"
            assert depthwise_backends(x, weight, residual=True)["onednn"] == "chosen"
        assert depthwise_backends(x, weight)["convolution"] == "chosen"
        assert depthwise_backends(x.contiguous(), weight, activation="gelu")["convolution"] == "chosen"
        even = depthwise_backends(x, torch.zeros(8, 1, 2, 2), dilation=2, padding=1, residual=True)
        assert "an even kernel has no centre" in even["onednn"]
        with torch.autocast("cpu", torch.bfloat16):
            assert depthwise_backends(x, weight, activation="gelu")["convolution"] == "chosen"


def test_bad_arguments():
    x, weight, bias = tensors(1, 4, (5, 5), (3, 3))
    with pytest.raises(ValueError, match="activation is 'gelu' or None; got 'relu'"):
        depthwise_conv2d(x, weight, bias, activation="relu")
    with pytest.raises(ValueError, match=r"a map of \[5, 5\] can't be added to a convolution of \[3, 3\]"):
        depthwise_conv2d(x, weight, bias, padding=0, residual=True)
    with pytest.raises(ValueError, match=r"a weight \[C, 1, h, w\]; got"):
        depthwise_conv2d(x, weight[:2], bias)
    with pytest.raises(ValueError, match="a 2x3 kernel has no centre"):
        depthwise_conv2d(x, weight[:, :, :2], bias)
    with pytest.raises(ValueError, match="dilation and stride must be positive"):
        depthwise_conv2d(x, weight, bias, dilation=(0, 1))
    with pytest.raises(ValueError, match="stride must be positive, got 1 and"):
        depthwise_conv2d(x, weight, bias, stride=0)
    with pytest.raises(ValueError, match="'interleaved' cannot run here: it has no strides"):
        depthwise_conv2d(x, weight, bias, 2, stride=2, backend="interleaved")
    with pytest.raises(ValueError, match="padding must not be negative"):
        depthwise_conv2d(x, weight, bias, padding=(1, -1))
    with pytest.raises(ValueError, match=r"a 3x3 kernel of dilation .* does not fit into a map of 5x5"):
        depthwise_conv2d(x, weight, bias, dilation=3, padding=0)


def test_a_layer_that_is_watched_or_more_than_plain_is_called():
    x = torch.randn(1, 6, 9, 8)
    conv = nn.Conv2d(6, 6, 7, padding=9, dilation=3, groups=6)
    torch.testing.assert_close(apply_depthwise(conv, x), conv(x))
    seen = []
    handle = conv.register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    hooked = apply_depthwise(conv, x)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(hooked, 2 * conv(x))
    prune.random_unstructured(conv, "weight", 0.5)
    torch.testing.assert_close(apply_depthwise(conv, x), conv(x))
    for act, residual in product((nn.GELU(), nn.GELU("tanh"), nn.ReLU(), None), (False, True)):
        expected = x + conv(x) if residual else conv(x)
        expected = expected if act is None else act(expected)
        torch.testing.assert_close(apply_depthwise(conv, x, act, residual), expected)
    others = ({"stride": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"groups": 3}, {})
    for options in others:
        conv = nn.Conv2d(6, 6, 3, **{"groups": 6, "dilation": 2, **options})
        torch.testing.assert_close(apply_depthwise(conv, x), conv(x))


@pytest.mark.parametrize(("kernel", "dilation"), [((7, 7), 3), ((1, 21), 1)])
def test_graphs(kernel, dilation):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            padding = tuple(k // 2 * dilation for k in kernel)
            self.conv = nn.Conv2d(4, 4, kernel, padding=padding, dilation=dilation, groups=4)

        def forward(self, x):
            return apply_depthwise(self.conv, x)

    net = Net().eval()
    compiled = torch.compile(net, backend="eager", dynamic=True, fullgraph=True)
    for size in product((1, 10, 23), (9, 22)):
        x = torch.randn(1, 4, *size)
        torch.testing.assert_close(compiled(x), net.conv(x))
    dynamic = {2: torch.export.Dim("height", max=99), 3: torch.export.Dim("width", max=99)}
    graph = torch.export.export(net, (torch.randn(1, 4, 10, 22),), dynamic_shapes=(dynamic,))
    operators = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in operators if name.startswith("aten")] == ["aten.conv2d.default"]
    torch.testing.assert_close(graph.module()(x), net.conv(x))


def test_compiled_graphs_leave_a_convolution_and_what_follows_to_onednn():
    layer, act = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16), torch.nn.GELU()
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    graphs = []

    def compile_to(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def is_one(x, act, residual, grad=False):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            call = lambda x: apply_depthwise(layer, x, act, residual)  # noqa: E731
            out = torch.compile(call, backend=compile_to, fullgraph=True)(x)
            expected = x + layer(x) if residual else layer(x)
            expected = expected if act is None else act(expected)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
            assert out.stride() == expected.stride()
        return "foveate.depthwise" in " ".join(graphs[-1])

    for kind, residual in ((act, False), (act, True), (None, True)):
        assert is_one(x, kind, residual) == onednn.is_available()
    assert not is_one(x, None, False)
    assert not is_one(x, torch.nn.GELU("tanh"), False)
    assert not is_one(x, act, False, grad=True)
    assert not is_one(x.contiguous(), act, False)
    layer.forward = lambda x: 2 * F.conv2d(x, layer.weight, padding=1, groups=16)
    assert not is_one(x, act, False)
    del layer.forward
    layer.register_forward_hook(lambda module, args, out: out + 1)
    assert not is_one(x, act, False)


@pytest.mark.skipif(not onednn.is_available(), reason="torch has no oneDNN here")
def test_the_operator_of_compiled_graphs_keeps_torchs_rules():
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    arguments = x, torch.randn(8, 1, 3, 3), torch.randn(8), [1, 1], True, "gelu"
    torch.library.opcheck(compiled_depthwise, arguments, test_utils=("test_schema", "test_faketensor"))
