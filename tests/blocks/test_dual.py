"""Dual attention: the published roles and scale, padding, half precision on large maps."""

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import ChannelGroupAttention2d, DualAttention2d, WindowAttention2d
from foveate.blocks.pointwise import apply_linear
from foveate.kernels.pointwise import pointwise
from timm.models.davit import ChannelAttention, WindowAttention

BLOCKS = {
    "window": lambda: WindowAttention2d(32, num_heads=2, window_size=(3, 5), rel_pos_bias=False),
    "channel": lambda: ChannelGroupAttention2d(32, num_groups=2),
    "dual": lambda: DualAttention2d(32, num_heads=4),
}


def test_windows_are_padded_before_the_projection():
    """Padded positions are tokens whose keys and values are the biases, in timm as in the published code."""
    ours, theirs = WindowAttention2d(24, 3, 7, rel_pos_bias=False), WindowAttention(24, (7, 7), 3)
    torch.nn.init.normal_(ours.qkv.bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 10, 13, 24)
    padded = F.pad(x, (0, 0, 0, 1, 0, 4)).view(2, 2, 7, 2, 7, 24).transpose(2, 3).reshape(8, 49, 24)
    expected = theirs(padded).view(2, 2, 2, 7, 7, 24).transpose(2, 3).reshape(2, 14, 14, 24)[:, :10, :13]
    torch.testing.assert_close(ours(x), expected)


def test_channel_attention_is_timms():
    ours, theirs = ChannelGroupAttention2d(24, 3), ChannelAttention(24, 3, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 10, 13, 24)
    torch.testing.assert_close(ours(x), theirs(x.flatten(1, 2)).view(x.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channel_attention_is_finite_in_half_precision_on_large_maps(dtype):
    """Scores that sum over all positions: beyond 65504 here, where the explicit product in float16 is infinite."""
    block = ChannelGroupAttention2d(16, num_groups=1)
    torch.nn.init.eye_(block.proj.weight)
    torch.nn.init.zeros_(block.qkv.weight)
    with torch.no_grad():
        block.qkv.weight.copy_(torch.eye(16).repeat(3, 1))
    x = 6 * torch.randn(1, 128, 96, 16)
    keys = x.flatten(1, 2).to(dtype)
    assert (keys.float().square().sum(1) / 4).amax() > 65504
    with torch.inference_mode():
        out = block.to(dtype)(x.to(dtype))
        expected = block.float()(x.to(dtype).float())
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 20), (15, 8)])
@pytest.mark.parametrize("name", BLOCKS)
def test_any_map_size_gives_finite_gradients(name, size):
    block = BLOCKS[name]()
    x = torch.randn(2, *size, 32, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    for gradient in [x.grad, *(parameter.grad for parameter in block.parameters())]:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", BLOCKS)
def test_compiles_and_exports(name):
    block = BLOCKS[name]().eval()
    x = torch.randn(2, 9, 11, 32)
    with torch.inference_mode():
        expected = block(x)
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (14, 9), (7,)])
def test_convolution_is_the_linear_layer(size):
    x = torch.randn(2, *size, 24, requires_grad=True)
    layer = torch.nn.Linear(24, 40)
    gradients = []
    for backend in ("linear", "convolution"):
        out = pointwise(x, layer.weight, layer.bias, backend=backend)
        gradients.append([out, *torch.autograd.grad(out.sin().sum(), [x, layer.weight, layer.bias])])
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(apply_linear(layer, x), gradients[0][0])


def test_wrong_settings_are_one_line():
    with pytest.raises(ValueError, match="num_groups to divide dim; got dim 10, groups 3"):
        ChannelGroupAttention2d(10, 3)
    with pytest.raises(ValueError, match=r"no backend 'gemm'; it has .*'onednn', 'onednn_trained'"):
        pointwise(torch.zeros(1, 1, 1, 2), torch.zeros(2, 2), backend="gemm")
