"""Large kernel attention: the definition, both layouts, small maps, gradients, what is not finite."""

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import LargeKernelAttention2d, create_attention
from torch import nn

GATES = ("dilated", "strips")


def attention_in_one_kernel_each(module, x):
    """The definition by convolutions that are written out; ``x`` is NCHW."""
    u = F.gelu(module.proj1(x))
    gate, dim = module.gate, x.shape[1]
    local = F.conv2d(u, gate.local.weight, gate.local.bias, padding=2, groups=dim)
    if hasattr(gate, "dilated"):
        # A dilated kernel is a larger one with zeros between.
        weight = torch.zeros(dim, 1, 19, 19, dtype=x.dtype)
        weight[:, :, ::3, ::3] = gate.dilated.weight
        inner = F.conv2d(local, weight, gate.dilated.bias, padding=9, groups=dim)
    else:
        inner = local
        for length, row, column in zip((7, 11, 21), gate.rows, gate.columns, strict=True):
            strip = F.conv2d(F.pad(local, (length // 2, length // 2)), row.weight, row.bias, groups=dim)
            inner = inner + F.conv2d(
                F.pad(strip, (0, 0, length // 2, length // 2)), column.weight, column.bias, groups=dim
            )
    return module.proj2(gate.mix(inner) * u) + x


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [(25, 30), (9, 4), (1, 1), (1, 5)])
def test_is_its_definition_in_both_layouts(gate, size):
    torch.manual_seed(0)
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    last = LargeKernelAttention2d(6, gate, dtype=torch.float64)
    first = LargeKernelAttention2d(6, gate, channels_first=True, dtype=torch.float64)
    first.load_state_dict(last.state_dict())
    expected = attention_in_one_kernel_each(last, x.permute(0, 3, 1, 2))
    torch.testing.assert_close(last(x), expected.permute(0, 2, 3, 1))
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2)), expected)
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2).contiguous()), expected)


@pytest.mark.parametrize("gate", GATES)
def test_gradients(gate):
    torch.manual_seed(0)
    module = LargeKernelAttention2d(2, gate, dtype=torch.float64)
    x = torch.randn(1, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)


@pytest.mark.parametrize("gate", GATES)
def test_what_is_not_finite_stays_within_the_kernels_reach(gate):
    torch.manual_seed(0)
    module, x = LargeKernelAttention2d(4, gate), torch.randn(2, 40, 41, 4)
    x[1, 0, 0, 2] = float("inf")
    with torch.no_grad():
        out = module(x)
    assert out[0].isfinite().all()
    assert not out[1, 0, 0].isfinite().any()
    # The reach of 5x5 and then 7x7 of dilation 3, or 21 strips.
    assert out[1, 13:].isfinite().all()
    assert out[1, :, 13:].isfinite().all()


def test_by_name():
    attention = create_attention("large_kernel", 16, num_heads=3, gate="strips")
    assert isinstance(attention, LargeKernelAttention2d)
    assert attention(torch.randn(1, 5, 7, 16)).shape == (1, 5, 7, 16)
    with pytest.raises(ValueError, match="there is no gate 'round'; there are 'dilated', 'strips'"):
        create_attention("large_kernel", 16, 2, gate="round")


def test_layers_that_are_pruned_or_watched_are_called():
    torch.manual_seed(0)
    module, x = LargeKernelAttention2d(8), torch.randn(1, 6, 5, 8)
    expected = module(x)
    seen = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    torch.testing.assert_close(module(x), expected)
    assert len(seen) == len(set(seen)) == 5
