"""GELU and linear layer whose hidden map is made again: the reference's numbers and gradients, of any order."""

import importlib

import pytest
import torch
from foveate.blocks.depthwise_mlp import DepthwiseMlp
from foveate.blocks.pointwise import PointwiseMlp
from foveate.kernels import gelu_linear, gelu_linear_backends, onednn
from foveate.zoo.dat import ConvMlp
from foveate.zoo.van import ConvFeedForward

module = importlib.import_module("foveate.kernels.gelu_linear")


def tensors(*shape, out=5, conv=None, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = shape[-1]
    given = [torch.randn(*shape), torch.randn(out, hidden), torch.randn(out) if bias else None]
    given += [None, None] if conv is None else [torch.randn(hidden, 1, *conv), torch.randn(hidden) if bias else None]
    return [None if x is None else x.to(dtype).requires_grad_() for x in given]


@pytest.mark.parametrize("piece", [1, 100, 2**20])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "conv", "residual"),
    [
        ((2, 6, 7, 8), (3, 3), False),
        ((2, 6, 7, 8), (3, 3), True),
        ((1, 9, 4, 8), (5, 1), False),
        ((2, 6, 7, 8), None, False),
        ((3, 11, 8), None, False),
    ],
)
def test_values_and_gradients_are_the_references(shape, conv, residual, bias, piece, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    given = tensors(*shape, conv=conv, bias=bias)
    wanted = [x for x in given if x is not None]
    both = []
    for backend in ("recomputed", "reference"):
        out = gelu_linear(*given, residual=residual, backend=backend)
        torch.manual_seed(1)
        both.append([out, *torch.autograd.grad(out, wanted, torch.randn_like(out))])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.skipif(not onednn.is_available(), reason="torch has no oneDNN here")
@pytest.mark.parametrize("slow", [True, False])
def test_products_are_those_of_the_faster_library(slow, monkeypatch):
    monkeypatch.setattr(onednn, "is_faster_than_blas", lambda: slow)
    monkeypatch.setattr(module, "_PIECE", 100)
    given = tensors(2, 6, 7, 16, conv=(3, 3), dtype=torch.float32)  # as many channels as a vector has lanes
    grads = [
        torch.autograd.grad(gelu_linear(*given, backend=backend).square().sum(), given)
        for backend in ("recomputed", "reference")
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("frozen", range(5))
def test_what_is_frozen_costs_no_gradient(frozen):
    given = tensors(1, 4, 3, 8, conv=(3, 3))
    given[frozen].requires_grad_(False)
    gelu_linear(*given, backend="recomputed").sum().backward()
    ours = [x.grad for x in given]
    for x in given:
        x.grad = None
    gelu_linear(*given, backend="reference").sum().backward()
    assert ours[frozen] is None
    for grad, x in zip(ours, given, strict=True):
        torch.testing.assert_close(grad, x.grad) if grad is not None else None


def test_gradients_have_gradients():
    given = tensors(1, 3, 2, 4, out=3, conv=(3, 3))
    assert torch.autograd.gradgradcheck(lambda *x: gelu_linear(*x, residual=True, backend="recomputed"), given)


def test_only_the_map_is_kept():
    given = tensors(2, 6, 7, 8, conv=(3, 3))
    memory = {}
    for backend in ("recomputed", "reference"):
        stored = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, stored=stored: stored.setdefault(x.data_ptr(), x), lambda x: x
        ):
            gelu_linear(*given, backend=backend)
        memory[backend] = sum(x.numel() == given[0].numel() for x in stored.values())
    assert memory == {"recomputed": 1, "reference": 3}


@pytest.mark.parametrize("conv", [None, (3, 3)])
def test_backward_passes_in_surroundings_of_their_own(conv):
    given = tensors(2, 6, 7, 8, conv=conv, dtype=torch.float32)
    wanted = [x for x in given if x is not None]
    many = torch.randn(3, 2, 6, 7, 5)
    results = []
    for backend in ("reference", "recomputed"):
        out = gelu_linear(*given, backend=backend)
        batched = torch.autograd.grad(out, wanted, many, retain_graph=True, is_grads_batched=True)
        with torch.no_grad():
            given[2].add_(1)  # which no gradient depends on
        with torch.autocast("cpu", torch.bfloat16, enabled=backend == "recomputed"):
            results.append([*batched, *torch.autograd.grad(out, wanted, many[0])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_second_derivatives_where_a_weight_is_computed_from_the_map():
    given = tensors(1, 4, 5, 8, conv=(3, 3))
    results = []
    for backend in ("reference", "recomputed"):
        x, weight, bias, conv_weight, conv_bias = given
        operands = x, weight * x.mean(), bias, conv_weight * x.std(), conv_bias
        (grad,) = torch.autograd.grad(gelu_linear(*operands, backend=backend).square().sum(), x, create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), given)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_large_maps_are_made_again_and_small_ones_kept(monkeypatch):
    given = tensors(2, 6, 7, 8, dtype=torch.float32)
    assert gelu_linear_backends(*given)["reference"] == "chosen"
    monkeypatch.setattr(module, "_LARGE", 1)
    assert gelu_linear_backends(*given)["recomputed"] == "chosen"
    with torch.no_grad():
        assert gelu_linear_backends(*given)["reference"] == "chosen"
    with torch.autocast("cpu"):
        assert gelu_linear_backends(*given)["recomputed"] == "it computes in one precision"
    halves = [None if x is None else x.bfloat16() for x in given]
    assert "got torch.bfloat16" in gelu_linear_backends(*halves)["recomputed"]
    with pytest.raises(ValueError, match="backend 'recomputed' cannot run here: it is for float32"):
        gelu_linear(*halves, backend="recomputed")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 7), (3, 8)), r"takes x \[..., hidden\] and a weight"),
        (((2, 8), (3, 8), None, (8, 1, 3, 3)), "of odd h and w"),
        (((1, 4, 4, 8), (3, 8), None, (8, 1, 2, 2)), "of odd h and w"),
        (((1, 4, 4, 8), (3, 8), None, (4, 1, 3, 3)), "of odd h and w"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        gelu_linear(*(None if shape is None else torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("mlp", "shape"),
    [
        (lambda: PointwiseMlp(8, 32), (2, 5, 6, 8)),
        (lambda: DepthwiseMlp(8, 32), (2, 5, 6, 8)),
        (lambda: ConvMlp(8, 32, 0.0), (2, 8, 5, 6)),
        (lambda: ConvFeedForward(8, 32, 0.0), (2, 8, 5, 6)),
    ],
    ids=["pointwise", "depthwise", "dat", "van"],
)
def test_mlps_train_alike_either_way(mlp, shape, checkpointed, monkeypatch):
    torch.manual_seed(0)
    mlp, x = mlp().train(), torch.randn(shape)
    if len(shape) == 4 and shape[1] == 8:
        x = x.to(memory_format=torch.channels_last)
    results, calls = [], []
    recomputed = module._Recomputed.apply
    monkeypatch.setattr(module._Recomputed, "apply", lambda *args: calls.append(1) or recomputed(*args))
    for large in (2**23, 1):
        monkeypatch.setattr(module, "_LARGE", large)
        leaf = x.clone().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(mlp, leaf, use_reentrant=False) if checkpointed else mlp(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *mlp.parameters()])])
    assert calls
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_dropout_and_hooks_keep_the_layers(monkeypatch):
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(module._Recomputed, "apply", lambda *args: pytest.fail("not the layers"))
    x = torch.randn(1, 5, 6, 8)
    assert (DepthwiseMlp(8, 32, drop=0.5).train()(x) == 0).any()
    seen = []
    mlp = DepthwiseMlp(8, 32)
    mlp.act.register_forward_hook(lambda *args: seen.append(1))
    mlp(x)
    assert seen
