"""Efficient Local Attention: the published values, its limits, its place in timm's networks."""

from functools import partial

import pytest
import timm
import torch
from foveate.blocks import EfficientLocalAttention


@pytest.mark.parametrize("variant", ["t", "s"])
def test_published_values(variant, open_fixture):
    fixture = open_fixture(f"ela/ela_{variant}")
    block = EfficientLocalAttention(64, variant)
    block.load_state_dict(fixture.state())
    x = fixture.input()
    with torch.inference_mode():
        rows, columns = block.gates(x)
        fixture.assert_output("gate_h", rows, 1e-6)
        fixture.assert_output("gate_w", columns, 1e-6)
        fixture.assert_output("out", block(x), 2e-6)


@pytest.mark.parametrize(("variant", "parameters"), [("t", 7), ("b", 9), ("s", 42), ("l", 58)])
def test_parameters_per_channel(variant, parameters):
    block = EfficientLocalAttention(96, variant)
    assert sum(parameter.numel() for parameter in block.parameters()) == 96 * parameters


def test_a_transposed_map_gives_the_transposed_output():
    """One convolution and one norm serve both directions."""
    block = EfficientLocalAttention(32, "l")
    x = torch.randn(2, 32, 5, 13)
    torch.testing.assert_close(block(x.transpose(2, 3)), block(x).transpose(2, 3))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3)])
@pytest.mark.parametrize("variant", "tbsl")
def test_any_map_size_gives_finite_gradients(variant, size):
    block = EfficientLocalAttention(32, variant)
    x = torch.randn(2, 32, *size).to(memory_format=torch.channels_last).requires_grad_()
    out = block(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_skip_adds_the_input():
    plain, skip = EfficientLocalAttention(16), EfficientLocalAttention(16, skip=True)
    skip.load_state_dict(plain.state_dict())
    x = torch.randn(1, 16, 6, 4)
    torch.testing.assert_close(skip(x), x + plain(x))


def test_wrong_settings_name_the_way_out():
    with pytest.raises(ValueError, match="needs a multiple of 32 channels; got 144: variants 'b', 's', 'l' take it"):
        EfficientLocalAttention(144, "t")
    with pytest.raises(ValueError, match="got 24: change the number of channels"):
        EfficientLocalAttention(24, "b")
    with pytest.raises(ValueError, match="variants 't', 'b', 's', 'l'; got 'xl'"):
        EfficientLocalAttention(64, "xl")


def test_is_an_attention_layer_of_timm():
    """The parameter count is the one that the research sheet measured for ResNet-18 with ELA-L in every block."""
    layer = partial(EfficientLocalAttention, variant="l")
    net = timm.create_model("resnet18", block_args=dict(attn_layer=layer), device="meta")
    assert sum(parameter.numel() for parameter in net.parameters()) == 11_800_872


def test_compiles_and_exports():
    block = EfficientLocalAttention(32, "s", skip=True).eval()
    x = torch.randn(1, 32, 9, 5)
    with torch.inference_mode():
        expected = block(x)
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)
