"""Cross-shaped window attention: which positions see each other, padding, gradients."""

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import CrossShapedAttention2d


def reference(block, x, stripe):
    """Attention over the whole map in which a mask hides other stripes, and a convolution run stripe by stripe."""
    height, width, dim = x.shape[1:]
    rows, columns = torch.arange(height), torch.arange(width)
    outs = []
    # The first half of the channels sees vertical stripes, the second horizontal ones.
    stripes = [(height, width)] if stripe is None else [(height, stripe), (stripe, width)]
    branches = len(stripes)
    for i, (stripe_height, stripe_width) in enumerate(stripes):
        number = (rows[:, None] // stripe_height * width + columns[None] // stripe_width).flatten()
        mask = number[:, None] == number[None]
        part = slice(i * dim // branches, (i + 1) * dim // branches)
        q, k, v = [tokens[..., part] for tokens in block.qkv(x).chunk(3, -1)]

        def split(tokens):
            return tokens.flatten(1, 2).unflatten(2, (block.num_heads // branches, -1)).transpose(1, 2)

        out = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask)
        out = out.transpose(1, 2).flatten(2).unflatten(1, (height, width))
        local = torch.zeros_like(out)
        for top in range(0, height, stripe_height):
            for left in range(0, width, stripe_width):
                window = (slice(None), slice(top, top + stripe_height), slice(left, left + stripe_width))
                local[window] = block.lepe[i](v[window].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        outs.append(out + local)
    return block.proj(torch.cat(outs, -1))


@pytest.mark.parametrize(("stripe", "size"), [(2, (6, 4)), (3, (3, 9)), (None, (5, 7)), (1, (4, 5))])
def test_positions_see_their_stripes(stripe, size):
    block = CrossShapedAttention2d(16, num_heads=4, stripe=stripe)
    x = torch.randn(2, *size, 16)
    with torch.no_grad():
        block.qkv.weight.normal_()
        torch.testing.assert_close(block(x), reference(block, x, stripe), rtol=1e-4, atol=1e-5)


def test_ragged_map_is_padded_on_all_sides_after_the_projection():
    """5x8 with stripes of 7: the vertical ones pad 3 columns left and right, the horizontal ones 1 row each."""
    block = CrossShapedAttention2d(16, num_heads=4, stripe=7)
    x = torch.randn(2, 5, 8, 16)
    with torch.no_grad():
        out = block(x)
        q, k, v = block.qkv(x).chunk(3, -1)
        halves = []
        for part, pad in ((slice(0, 8), (0, 0, 3, 3, 0, 0)), (slice(8, 16), (0, 0, 0, 0, 1, 1))):
            padded = [F.pad(tokens[..., part], pad) for tokens in (q, k, v)]
            probe = CrossShapedAttention2d(8, num_heads=2, stripe=None)
            probe.qkv, probe.proj = torch.nn.Identity(), torch.nn.Identity()
            probe.lepe[0] = block.lepe[len(halves)]
            if pad[2]:
                whole = torch.cat([probe(torch.cat([t[:, :, i : i + 7] for t in padded], -1)) for i in (0, 7)], 2)
                halves.append(whole[:, :, 3:11])
            else:
                halves.append(probe(torch.cat(padded, -1))[:, 1:6])
        torch.testing.assert_close(out, block.proj(torch.cat(halves, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (13, 3), (7, 14)])
def test_every_parameter_gets_a_finite_gradient(size):
    block = CrossShapedAttention2d(16, num_heads=4, stripe=7)
    x = torch.randn(2, *size, 16, requires_grad=True)
    block(x).square().sum().backward()
    for gradient in [x.grad, *(parameter.grad for parameter in block.parameters())]:
        assert gradient.isfinite().all()


def test_wrong_settings_are_one_line():
    with pytest.raises(ValueError, match="2 to divide num_heads"):
        CrossShapedAttention2d(9, num_heads=3)
