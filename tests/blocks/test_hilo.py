"""HiLo attention as a module: the published one, padding that takes part, heads of one kind alone."""

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import HiLoAttention2d, create_attention

SIZES = {"hilo_8x12_ws2": (8, 12), "hilo_9x14_ws4_padded": (9, 14)}


@pytest.mark.parametrize("name", SIZES)
def test_hilo_is_the_published_one(name, open_fixture):
    fixture = open_fixture(f"hilo/{name}")
    block = HiLoAttention2d(**fixture.spec["notes"]["kwargs"])
    block.load_state_dict(fixture.state())
    with torch.no_grad():
        out = block(fixture.input().unflatten(1, SIZES[name])).flatten(1, 2)
    fixture.assert_output("out", out, 1e-5 * fixture.spec["outputs"]["out"]["std"])


def softmax_attention(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(-3, -2).flatten(-2)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [(6, 9), (7, 4), (2, 2)])
def test_hilo_is_attention_within_windows_and_to_their_averages(size, alpha):
    torch.manual_seed(0)
    block, window = HiLoAttention2d(24, num_heads=4, window_size=3, alpha=alpha), 3
    x = torch.randn(2, *size, 24)
    padded = F.pad(x, (0, 0, 0, -size[1] % window, 0, -size[0] % window))
    with torch.no_grad():
        parts = []
        if alpha < 1:
            high = torch.zeros(*padded.shape[:3], block.h_proj.in_features)
            for row in range(0, padded.shape[1], window):
                for column in range(0, padded.shape[2], window):
                    here = (slice(None), slice(row, row + window), slice(column, column + window))
                    q, k, v = block.h_qkv(padded[here].flatten(1, 2)).chunk(3, dim=-1)
                    high[here] = softmax_attention(q, k, v, block.high_heads).unflatten(1, (window, window))
            parts.append(block.h_proj(high)[:, : size[0], : size[1]])
        if alpha > 0:
            windows = padded.unflatten(2, (-1, window)).unflatten(1, (-1, window)).mean((2, 4)).flatten(1, 2)
            k, v = block.l_kv(windows).chunk(2, dim=-1)
            low = softmax_attention(block.l_q(x.flatten(1, 2)), k, v, block.low_heads)
            parts.append(block.l_proj(low).unflatten(1, size))
        torch.testing.assert_close(block(x), torch.cat(parts, dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "alpha", "low"), [(12, 0.9, 10), (16, 0.9, 14), (12, 0.7, 8), (12, 0.2, 2), (3, 0, 0)]
)
def test_heads_are_rounded_down(heads, alpha, low):
    block = HiLoAttention2d(8 * heads, heads, alpha=alpha)
    assert (block.low_heads, block.high_heads) == (low, heads - low)


def test_windows_of_one_position_are_global_attention():
    torch.manual_seed(0)
    block = HiLoAttention2d(24, num_heads=4, window_size=1, alpha=0.0)
    assert block.high_heads == 0
    x = torch.randn(2, 5, 7, 24)
    with torch.no_grad():
        k, v = block.l_kv(x.flatten(1, 2)).chunk(2, dim=-1)
        expected = block.l_proj(softmax_attention(block.l_q(x.flatten(1, 2)), k, v, 4)).unflatten(1, (5, 7))
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="num_heads to divide dim; got dim 10, heads 3"):
        HiLoAttention2d(10, num_heads=3)
    with pytest.raises(ValueError, match=r"alpha from 0 to 1 .* got alpha 1.5"):
        HiLoAttention2d(12, num_heads=3, alpha=1.5)
    with pytest.raises(ValueError, match="windows of 0"):
        create_attention("hilo", 12, 3, window_size=0)
