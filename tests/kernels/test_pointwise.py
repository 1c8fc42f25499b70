"""Linear layers over maps: every backend against torch's, with and without an activation, and what is chosen when."""

import copy

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks.pointwise import apply_linear_gelu, apply_pointwise
from foveate.kernels import onednn, pointwise_backends
from foveate.kernels.pointwise import outruns_convolution, pointwise

pytestmark = pytest.mark.versions

BACKENDS = ("onednn", "onednn_trained", "convolution", "linear")


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 9), (1, 1, 1)])
@torch.inference_mode()
def test_every_backend_is_the_layer(shape, bias, activation):
    torch.manual_seed(0)
    x, weight, offset = torch.randn(*shape, 24), torch.randn(40, 24), torch.randn(40) if bias else None
    expected = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    expected = F.gelu(expected) if activation else expected
    for backend in BACKENDS:
        out = pointwise(x, weight, offset, backend=backend, activation=activation)
        torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_parts_of_a_weight_and_strided_maps():
    torch.manual_seed(0)
    weight, x = torch.randn(40, 24), torch.randn(2, 24, 5, 7).permute(0, 2, 3, 1)
    torch.testing.assert_close(pointwise(x, weight[:16]), F.linear(x, weight[:16]), atol=2e-5, rtol=1e-5)
    bias = torch.randn(1).expand(40)
    torch.testing.assert_close(pointwise(x, weight, bias), F.linear(x, weight, bias), atol=2e-5, rtol=1e-5)
    x = torch.randn(2, 5, 7, 48)[..., ::2]
    torch.testing.assert_close(pointwise(x, weight), F.linear(x, weight), atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no products of bfloat16 here")
@pytest.mark.parametrize("activation", [None, "gelu"])
@torch.inference_mode()
def test_bfloat16_is_rounded_once(activation):
    torch.manual_seed(0)
    x, weight, bias = (t.bfloat16() for t in (torch.randn(2, 5, 7, 24), torch.randn(40, 24) / 5, torch.randn(40)))
    assert pointwise_backends(x, weight, bias)["onednn"] == "chosen"
    exact = F.linear(x.double(), weight.double(), bias.double())
    exact = F.gelu(exact) if activation else exact
    out = pointwise(x, weight, bias, activation=activation)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=2**-8)


def test_what_is_chosen(monkeypatch):
    monkeypatch.setattr(onednn, "is_slower_than_blas", lambda inputs, numbers: False)
    x, weight = torch.randn(2, 5, 7, 24), torch.nn.Parameter(torch.randn(40, 24))
    assert "has no derivatives" in pointwise_backends(x, weight)["onednn"]
    with torch.no_grad():
        assert pointwise_backends(x, weight)["onednn"] == "chosen"
        assert "got torch.float64" in pointwise_backends(x.double(), weight.double())["onednn"]
        assert "takes nothing empty" in pointwise_backends(x[:0], weight)["onednn"]
        with torch.autocast("cpu", torch.bfloat16):
            assert pointwise_backends(x, weight)["onednn"] == "can run"
            assert pointwise(x, weight).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            assert "no oneDNN" in pointwise_backends(x, weight)["onednn"]


def test_where_the_blas_is_faster(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    sizes = {(16, 2**18), (16, 2**12), (128, 2**18)}  # channels and numbers of a map
    for isa, amd, fast in (("AVX2", True, sizes), ("AVX512", False, sizes - {(16, 2**18)}), ("AVX512", True, set())):
        monkeypatch.setattr(onednn, "_capability", lambda isa=isa: isa)
        monkeypatch.setattr(onednn, "_is_amd", lambda amd=amd: amd)
        assert {size for size in sizes if onednn.is_slower_than_blas(*size)} == fast
    monkeypatch.setattr(onednn, "_is_amd", lambda: False)
    conv = torch.nn.Conv2d(128, 8, 1)
    x = torch.randn(1, 128, 64, 64)
    assert outruns_convolution(x, conv.weight, conv.bias)
    assert not outruns_convolution(x[:, :64], conv.weight[:, :64], conv.bias)
    assert outruns_convolution(x[:, :64, :32], conv.weight[:, :64], conv.bias)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not outruns_convolution(x, conv.weight, conv.bias)


def test_a_fast_blas_is_taken(monkeypatch):
    monkeypatch.setattr(onednn, "is_slower_than_blas", lambda inputs, numbers: True)
    x, weight = torch.randn(2, 5, 7, 24), torch.randn(40, 24)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for trained in (False, True):
            report = pointwise_backends(x, weight.requires_grad_(trained))
            assert report["linear"] == "chosen"
            assert report["convolution"] == "can run"
    finally:
        torch.set_num_threads(threads)


def test_an_activation_spares_what_is_asked_for_again():
    x, weight = torch.randn(2, 5, 7, 24), torch.randn(40, 24)
    expected = F.gelu(F.linear(x, weight))
    before = x.clone()
    for requires_grad in (False, True):
        torch.testing.assert_close(
            pointwise(x, weight.requires_grad_(requires_grad), backend="linear", activation="gelu"), expected
        )
    assert torch.equal(x, before)
    mapped = torch.func.vmap(lambda x: pointwise(x, weight.detach(), backend="linear", activation="gelu"))(x)
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("act", [torch.nn.GELU(), torch.nn.GELU("tanh"), torch.nn.ReLU()])
def test_activations_are_the_layers_own(act):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 40), torch.randn(2, 5, 7, 24)
    expected = act(layer(x))
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(apply_linear_gelu(layer, act, x), expected, atol=2e-5, rtol=1e-5)
    seen = []
    act.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        apply_linear_gelu(layer, act, x)
    assert seen == [1]


@torch.no_grad()
def test_a_changed_weight_is_never_missed():
    layer, x = torch.nn.Linear(24, 40), torch.randn(2, 5, 7, 24)
    apply_linear_gelu(layer, torch.nn.GELU(), x)
    layer.weight.data.mul_(2)
    torch.testing.assert_close(apply_linear_gelu(layer, torch.nn.GELU(), x), F.gelu(layer(x)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("last", [True, False])
@torch.no_grad()
def test_pointwise_convolutions_keep_the_order_of_their_maps(last):
    layer, x = torch.nn.Conv2d(24, 40, 1), torch.randn(2, 24, 5, 7)
    x = x.to(memory_format=torch.channels_last) if last else x
    out, expected = apply_pointwise(layer, x), layer(x)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    assert out.stride() == expected.stride()


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 9), (11,)])
def test_products_of_onednn_have_the_layers_gradients(shape):
    torch.manual_seed(0)
    given = [torch.randn(*shape, 24), torch.randn(40, 24), torch.randn(40)]
    both = []
    for backend in ("onednn_trained", "linear"):
        x, weight, bias = (tensor.clone().requires_grad_() for tensor in given)
        out = pointwise(x, weight, bias, backend=backend, activation="gelu")
        first = torch.autograd.grad(out.square().sum(), (x, weight, bias), create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, weight, bias))
        # An expanded gradient has no strides to read by.
        summed = torch.autograd.grad(pointwise(x, weight, bias, backend=backend).sum(), (x, weight, bias))
        both.append([out, *first, *second, *summed])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=1e-4)


def test_what_is_frozen_gets_no_gradient():
    x, weight, bias = torch.randn(3, 24, requires_grad=True), torch.randn(40, 24), torch.randn(40)
    pointwise(x, weight, bias, backend="onednn_trained").sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), atol=1e-5, rtol=1e-5)


def test_products_of_onednn_are_for_a_slow_blas_and_one_thread(monkeypatch):
    x, weight = torch.randn(2, 5, 7, 24), torch.randn(40, 24, requires_grad=True)
    monkeypatch.setattr(onednn, "is_slower_than_blas", lambda inputs, numbers: False)
    threads = torch.get_num_threads()
    try:
        for slow, count, chosen in ((True, 1, "onednn_trained"), (False, 1, "linear"), (True, 2, "convolution")):
            monkeypatch.setattr(onednn, "is_faster_than_blas", lambda slow=slow: slow)
            torch.set_num_threads(count)
            assert pointwise_backends(x, weight)[chosen] == "chosen"
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(onednn, "is_faster_than_blas", lambda: True)
    with torch.autocast("cpu"):
        assert pointwise_backends(x, weight)["onednn_trained"] == "can run"
    assert "got torch.float64" in pointwise_backends(x.double(), weight.double())["onednn_trained"]
    assert torch.func.grad(lambda w: pointwise(x, w).sum())(weight).shape == weight.shape


def test_compiled_graphs_leave_plain_layers_to_onednn_where_the_blas_is_slow(monkeypatch):
    layer, act, x = torch.nn.Linear(16, 32), torch.nn.GELU(), torch.randn(1, 5, 7, 16)
    graphs = []

    def compile_to(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def is_left_to_onednn(grad=False):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            out = torch.compile(lambda x: apply_linear_gelu(layer, act, x), backend=compile_to, fullgraph=True)(x)
            torch.testing.assert_close(out, act(layer(x)), atol=1e-5, rtol=1e-5)
        return "foveate.linear" in " ".join(graphs[-1])

    monkeypatch.setattr(onednn, "is_faster_than_blas", lambda: False)
    assert not is_left_to_onednn()
    monkeypatch.setattr(onednn, "is_faster_than_blas", lambda: True)
    assert is_left_to_onednn()
    assert not is_left_to_onednn(grad=True)
    frozen = copy.deepcopy(layer).requires_grad_(False)

    def carried(x):
        return torch.func.jvp(lambda x: apply_linear_gelu(frozen, act, x), (x,), (torch.ones_like(x),))[1]

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(carried, backend=compile_to)(x), carried(x), atol=1e-5, rtol=1e-5)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight)
    assert not is_left_to_onednn()
    del layer.forward
    layer.register_forward_hook(lambda module, args, out: out + 1)
    assert not is_left_to_onednn()


def test_compiled_graphs_leave_pointwise_convolutions_to_onednn():
    layer, act, x = torch.nn.Conv2d(16, 32, 1), torch.nn.GELU(), torch.randn(2, 16, 5, 7)
    graphs = []

    def compile_to(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def is_left_to_onednn(x, grad=False):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            out = torch.compile(lambda x: apply_pointwise(layer, x, act), backend=compile_to, fullgraph=True)(x)
            torch.testing.assert_close(out, act(layer(x)), atol=1e-5, rtol=1e-5)
        return "foveate.linear" in " ".join(graphs[-1])

    assert not is_left_to_onednn(x)
    x = x.contiguous(memory_format=torch.channels_last)
    assert is_left_to_onednn(x) == onednn.is_available()
    assert not is_left_to_onednn(x, grad=True)
    layer.forward = lambda x: 2 * F.conv2d(x, layer.weight)
    assert not is_left_to_onednn(x)
    del layer.forward
    layer.register_forward_hook(lambda module, args, out: out + 1)
    assert not is_left_to_onednn(x)


def test_what_is_trained_by_onednn_may_change_in_place_and_be_differentiated_under_autocast():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 7, 24), (40, 24), (40,)))
    results = []
    for backend in ("linear", "onednn_trained"):
        out = pointwise(x, weight, bias, backend=backend).relu_()
        with torch.autocast("cpu", torch.bfloat16, enabled=backend == "onednn_trained"):
            firsts = torch.autograd.grad(out.square().mean(), (x, weight, bias), create_graph=True)
            loss = sum(first.square().sum() for first in firsts)
        results.append([*firsts, *torch.autograd.grad(loss, (x, weight))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_shapes_that_do_not_fit_are_torchs_own_error(trained, monkeypatch):
    monkeypatch.setattr(onednn, "is_faster_than_blas", lambda: True)
    weight = torch.randn(40, 23, requires_grad=trained)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pointwise(torch.randn(2, 5, 7, 24), weight)
    with pytest.raises(ValueError, match="backend 'onednn_trained' cannot run here: shapes don't fit"):
        pointwise(torch.randn(2, 5, 7, 24), weight, backend="onednn_trained")
