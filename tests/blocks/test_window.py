"""Windows: timm's Swin block where it is defined, padding and shifts where it is not."""

import pytest
import torch
from foveate.blocks.hilo import HiLoAttention2d
from foveate.blocks.window import WindowAttention2d, cut_windows, from_swin_table, join_windows
from timm.models.swin_transformer import SwinTransformerBlock


def swin_and_ours(size, window, shift):
    torch.manual_seed(0)
    swin = SwinTransformerBlock(32, size, 4, window_size=window, shift_size=shift)
    swin.norm1 = torch.nn.Identity()
    torch.nn.init.normal_(swin.attn.relative_position_bias_table)
    ours = WindowAttention2d(32, 4, window, shift)
    ours.qkv, ours.proj = swin.attn.qkv, swin.attn.proj
    ours.rpb.data = from_swin_table(swin.attn.relative_position_bias_table.data, window)
    return swin._attn, ours


@pytest.mark.parametrize(("size", "window"), [((12, 20), (4, 4)), ((9, 20), (3, 5))])
@pytest.mark.parametrize("shift", [0, 1, 2])
@torch.no_grad()
def test_equals_timms_swin(size, window, shift):
    """A shift is not half of the window everywhere."""
    theirs, ours = swin_and_ours(size, window, (shift, shift))
    x = torch.randn(2, *size, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [0, 2, 3])
@torch.no_grad()
def test_maps_are_padded_before_they_are_shifted(shift):
    """As in Swin's dense models; timm's Swin shifts first."""
    module = WindowAttention2d(32, 4, 4, shift)
    x = torch.randn(2, 11, 13, 32)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 3, 0, 1))
    torch.testing.assert_close(module(x), module(padded)[:, :11, :13])


def test_shifted_windows_work_on_maps_that_are_not_square():
    """Published dense code pads such maps with the axes swapped, and cannot shift them at all."""
    module = WindowAttention2d(8, 2, window_size=7, shift_size=4)
    x = torch.randn(1, 10, 23, 8, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("size", [(7, 7), (10, 23), (1, 3)])
@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
def test_joining_undoes_cutting(size, shift):
    x = torch.randn(2, *size, 3)
    windows = cut_windows(x, 4, 5, *shift)
    assert windows.shape[1:] == (20, 3)
    assert torch.equal(join_windows(windows, *size, 4, 5, *shift), x)


@torch.no_grad()
def test_windows_do_not_see_each_other():
    module = WindowAttention2d(8, 2, window_size=4)
    x = torch.randn(1, 8, 12, 8)
    changed = x.clone()
    changed[:, 4:, 8:] += 1
    difference = (module(changed) - module(x)).abs().sum(-1)[0] > 0
    assert difference[4:, 8:].all()
    assert difference.sum() == 16


def test_wrong_settings_are_one_line():
    with pytest.raises(ValueError, match="num_heads to divide dim; got dim 10, heads 3"):
        WindowAttention2d(10, 3)
    with pytest.raises(ValueError, match="0 <= shift_size < window_size; got 7"):
        WindowAttention2d(8, 2, window_size=7, shift_size=7)


@pytest.mark.parametrize("make", [lambda: WindowAttention2d(32, 2, window_size=(4, 5)), lambda: HiLoAttention2d(32, 4)])
def test_windows_that_are_read_in_place(make):
    layer, x = make().eval(), torch.randn(2, 11, 13, 32)
    expected = layer(x)  # which cuts them, for the gradients
    assert expected.requires_grad
    seen = []
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach(), atol=1e-5, rtol=1e-5)
        projection = layer.qkv if hasattr(layer, "qkv") else layer.h_qkv
        projection.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
        torch.testing.assert_close(layer(x), expected.detach(), atol=1e-5, rtol=1e-5)
    assert len(seen[0]) == 3  # who looks on sees windows
