"""Every layer is used by calling it: hooks, pruning, adapters, quantization and profilers see all of them."""

import copy
from collections import defaultdict

import pytest
import torch
from foveate.blocks import DeformableGate
from foveate.blocks.plain import is_plain
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

MODES = ("train", "eval", "no_grad")


def run(model: nn.Module, images: Tensor, mode: str) -> Tensor:
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        return model(images)


def owners(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if [*module.parameters(recurse=False)]}


def linear_like(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers and those 1x1 convolutions that are such."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
    }


def test_hooks_see_every_layer_and_change_nothing(model, images):
    expected = {mode: run(copy.deepcopy(model), images, mode) for mode in MODES}
    seen = defaultdict(list)
    for key, module in owners(model).items():
        module.register_forward_hook(lambda _, inputs, out, key=key: seen[key].append((inputs[0].shape, out.clone())))
    calls = []
    for mode in MODES:
        seen.clear()
        torch.testing.assert_close(run(copy.deepcopy(model), images, mode), expected[mode], atol=1e-4, rtol=1e-4)
        assert set(seen) == set(owners(model)), set(owners(model)) - set(seen)
        calls.append({key: [shape for shape, _ in entries] for key, entries in seen.items()})
    assert calls[0] == calls[1] == calls[2]


def test_hooks_of_all_modules_see_every_layer(model, images):
    seen = set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        run(model, images, "no_grad")
    finally:
        handle.remove()
    assert set(owners(model).values()) <= seen


def test_torchs_flop_counter_names_every_linear_layer(model, images):
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    names = {key.partition(".")[2] for key in counter.get_flop_counts()}
    assert {key for key, module in model.named_modules() if isinstance(module, nn.Linear)} <= names


def test_layers_have_torchs_own_types(model):
    for key, module in model.named_modules():
        for kind in (nn.Linear, nn.Conv2d):
            assert not isinstance(module, kind) or type(module) is kind, key


def test_pruned_models_train(model, images):
    model.train()
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for module in layers:
        prune.l1_unstructured(module, "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        for module in layers:
            assert module.weight_orig.grad is not None
            assert not module.weight_orig.grad[module.weight_mask == 0].any()
        optimizer.step()
    pruned = run(model, images, "no_grad")
    for module in layers:
        prune.remove(module, "weight")
    torch.testing.assert_close(run(model, images, "no_grad"), pruned, atol=1e-4, rtol=1e-4)


class Adapter(nn.Module):
    """A layer and an update of low rank beside it; what wraps a layer need not have its attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        inputs, outputs = layer.weight.shape[1], layer.weight.shape[0]
        self.down = nn.Parameter(torch.randn(2, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.randn(outputs, 2) / 2)

    def delta(self) -> Tensor:
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return self.layer(x) + x @ self.down.T @ self.up.T
        update = nn.functional.conv2d(x, self.down[..., None, None], stride=self.layer.stride)
        return self.layer(x) + nn.functional.conv2d(update, self.up[..., None, None])


def adapt(model: nn.Module) -> dict[str, Adapter]:
    adapters = {}
    for name, layer in linear_like(model).items():
        parent, _, child = name.rpartition(".")
        adapters[name] = Adapter(layer)
        setattr(model.get_submodule(parent), child, adapters[name])
    return adapters


def test_adapters_act_as_their_merged_weights_do(model, images):
    adapted = copy.deepcopy(model)
    adapters = adapt(adapted)
    with torch.no_grad():
        for key, adapter in adapters.items():
            model.get_submodule(key).weight += adapter.delta().reshape(adapter.layer.weight.shape)
    for mode in MODES:
        expected, actual = run(copy.deepcopy(model), images, mode), run(copy.deepcopy(adapted), images, mode)
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=2e-3)
    run(adapted, images, "train").square().sum().backward()
    for key, adapter in adapters.items():
        assert adapter.up.grad is not None, key


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_takes_every_linear_layer(model, images):
    model.eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = torch.ao.nn.quantized.dynamic.Linear
    linear = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {key for key, module in quantized.named_modules() if isinstance(module, kinds)} == linear
    assert run(quantized, images, "no_grad").isfinite().all()


def test_das_calls_its_deformable_convolution():
    gate, seen = DeformableGate(16), []
    gate.deformable.register_forward_hook(lambda *_: seen.append(True))
    gate(torch.randn(2, 16, 5, 7))
    assert seen == [True]


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class _Subclass(nn.Linear):
    pass


def _patched(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: x
    return layer


def _hooked(layer: nn.Linear, register: str) -> nn.Linear:
    getattr(layer, register)(lambda *_: None)
    return layer


def _pruned(layer: nn.Linear) -> nn.Linear:
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def _parametrized(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "weight", _Halved())
    return layer


def _with_child(layer: nn.Linear) -> nn.Linear:
    layer.adapter = nn.Linear(4, 4)
    return layer


def _of_subclass(layer: nn.Linear) -> nn.Linear:
    class Special(Tensor):
        pass

    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Special))
    return layer


@pytest.mark.parametrize(
    "change",
    [
        _patched,
        _pruned,
        _parametrized,
        _with_child,
        _of_subclass,
        *(
            pytest.param(lambda layer, register=register: _hooked(layer, register), id=register)
            for register in (
                "register_forward_hook",
                "register_forward_pre_hook",
                "register_full_backward_hook",
                "register_full_backward_pre_hook",
            )
        ),
        lambda layer: _Subclass(4, 4),
        lambda layer: nn.Conv1d(4, 4, 1),
        lambda layer: torch.nn.utils.weight_norm(layer),
        lambda layer: layer.compile() or layer,
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_more_than_a_layer_is_not_plain(change):
    layer = nn.Linear(4, 4)
    assert is_plain(layer)
    changed = change(layer)
    assert not is_plain(changed)
    assert not is_plain(nn.Linear(4, 4), changed)


def test_replaced_classes_are_not_plain(monkeypatch):
    layer = nn.Linear(4, 4)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not is_plain(layer)
    monkeypatch.undo()
    assert is_plain(layer)
    monkeypatch.setattr(nn.Module, "__call__", lambda self, x: x)
    assert not is_plain(layer)
