"""BiFormer's attention modules against a slow, independent writing of their definition; sizes, routing, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import BiLevelRoutingAttention2d, LePEAttention2d
from foveate.kernels import routed_attention


def by_hand(block, x):
    """Bi-level routing attention region by region, from the paper's text and the published padding rules."""
    batch, height, width, dim = x.shape
    n_win, heads = block.n_win, block.num_heads
    if block.ragged:
        rh, rw = max(1, height // n_win), max(1, width // n_win)
        rows, columns = math.ceil(height / rh), math.ceil(width / rw)
    else:
        rows = columns = n_win
        rh, rw = math.ceil(height / n_win), math.ceil(width / n_win)
        x = F.pad(x, (0, 0, 0, columns * rw - width, 0, rows * rh - height))
    q, k, v = F.linear(x, block.qkv.weight, block.qkv.bias).split(dim, -1)
    regions = [(slice(i * rh, (i + 1) * rh), slice(j * rw, (j + 1) * rw)) for i in range(rows) for j in range(columns)]
    out = torch.zeros_like(v)
    for b in range(batch):
        q_means, k_means = (torch.stack([m[b][region].flatten(0, 1).mean(0) for region in regions]) for m in (q, k))
        routing = q_means @ k_means.T
        for r, region in enumerate(regions):
            chosen = routing[r].topk(min(block.topk, len(regions))).indices.tolist()
            keys, values = (torch.cat([m[b][regions[c]].flatten(0, 1) for c in chosen]) for m in (k, v))
            # What a ragged region lacks of its full size takes part as a key and a value of zero.
            absent = len(chosen) * rh * rw - len(keys)
            keys, values = (F.pad(m, (0, 0, 0, absent)) for m in (keys, values))
            queries = q[b][region]
            for h in range(heads):
                part = slice(h * dim // heads, (h + 1) * dim // heads)
                weights = (queries[..., part] @ keys[:, part].T * dim**-0.5).softmax(-1)
                out[b][region][..., part] = weights @ values[:, part]
    out = out + block.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return block.proj(out)[:, :height, :width]


def sharp(block):
    """Scale the projection up, so that routing and attention are far from uniform."""
    with torch.no_grad():
        torch.nn.init.normal_(block.qkv.weight, std=block.qkv.in_features**-0.5)
        torch.nn.init.normal_(block.qkv.bias, std=0.3)
    return block


# Multiples of n_win, one axis ragged, both, fewer tokens than regions.
SIZES = [(14, 21), (14, 16), (13, 17), (16, 13), (3, 9), (1, 1), (2, 30)]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_block_is_its_definition_at_any_size(size, ragged):
    torch.manual_seed(size[0] * 100 + size[1])
    block = sharp(BiLevelRoutingAttention2d(24, num_heads=3, n_win=7, topk=4, ragged=ragged, dtype=torch.float64))
    x = torch.randn(2, *size, 24, dtype=torch.float64, requires_grad=True)
    out = block(x)
    torch.testing.assert_close(out, by_hand(block, x))
    out.square().sum().backward()
    for gradient in [x.grad, *(parameter.grad for parameter in block.parameters())]:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("n_win", [1, 2, 5])
def test_the_two_forms_agree_where_regions_divide_the_map(n_win):
    padded = sharp(BiLevelRoutingAttention2d(16, 2, n_win=n_win, topk=3))
    ragged = BiLevelRoutingAttention2d(16, 2, n_win=n_win, topk=3, ragged=True)
    ragged.load_state_dict(padded.state_dict())
    x = torch.randn(2, 10, 20, 16)
    torch.testing.assert_close(ragged(x), padded(x))
    if n_win > 1:
        x = torch.randn(2, 11, 19, 16)
        assert (ragged(x) - padded(x)).abs().max() > 1e-3


@pytest.mark.parametrize("ragged", [False, True])
def test_channels_first_is_a_layout(ragged):
    last = sharp(BiLevelRoutingAttention2d(16, 2, n_win=3, ragged=ragged))
    first = BiLevelRoutingAttention2d(16, 2, n_win=3, ragged=ragged, channels_first=True)
    first.load_state_dict(last.state_dict())
    x = torch.randn(2, 16, 7, 10)
    torch.testing.assert_close(first(x), last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert torch.equal(first.routed_regions(x).index, last.routed_regions(x.permute(0, 2, 3, 1)).index)


def test_all_regions_are_plain_attention():
    block = sharp(BiLevelRoutingAttention2d(16, 2, n_win=3, topk=9))
    x = torch.randn(1, 6, 9, 16)
    q, k, v = block.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=16**-0.5).transpose(1, 2).reshape(1, 6, 9, 16)
    lepe = block.lepe(block.qkv(x)[..., 32:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), block.proj(out + lepe))


def test_routed_regions_are_those_that_matter():
    """Values of a region change the output of the first region if, and only if, it is one of its routes."""
    torch.manual_seed(0)
    block = sharp(BiLevelRoutingAttention2d(16, 2, n_win=4, topk=3))
    x = torch.randn(1, 8, 12, 16)
    index, grid, size = block.routed_regions(x)
    assert index.shape == (1, 16, 3)
    assert grid == (4, 4)
    assert size == (2, 3)
    q, k, v = block.qkv(x).unflatten(-1, (3, 2, 8)).unbind(3)
    out = routed_attention(q, k, v, index, size, scale=block.scale)[0, :2, :3]
    for region in range(16):
        y, x_ = region // 4 * 2, region % 4 * 3
        changed = v.clone()
        changed[:, y : y + 2, x_ : x_ + 3] = 0
        matters = (routed_attention(q, k, changed, index, size, scale=block.scale)[0, :2, :3] - out).abs().max() > 1e-4
        assert matters == (region in index[0, 0])


@pytest.mark.parametrize("ragged", [False, True])
def test_attention_map_explains_the_output(ragged):
    block = sharp(BiLevelRoutingAttention2d(16, 2, n_win=3, topk=2, ragged=ragged))
    x = torch.randn(1, 7, 10, 16)
    regions = block.routed_regions(x)
    weights = block.attention_map(x)
    tokens = regions.region_size[0] * regions.region_size[1]
    assert weights.shape == (1, regions.grid[0] * regions.grid[1], 2, tokens, 2 * tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("ragged", [False, True])
def test_half_precision_routes_as_float32(ragged):
    """Under autocast the regions chosen are exactly those of float32."""
    torch.manual_seed(3)
    block = sharp(BiLevelRoutingAttention2d(32, 2, n_win=7, topk=4, ragged=ragged))
    x = torch.randn(2, 15, 22, 32)
    exact = block.routed_regions(x).index
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(block.routed_regions(x).index, exact)
            out = block(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), block(x), atol=0.1, rtol=0.1)
    rounded = block.to(torch.bfloat16)
    assert rounded(x.to(torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("ragged", [False, True])
def test_batched_equals_one_by_one(ragged):
    block = sharp(BiLevelRoutingAttention2d(16, 2, n_win=5, ragged=ragged))
    x = torch.randn(3, 12, 9, 16)
    torch.testing.assert_close(block(x), torch.cat([block(image[None]) for image in x]))


@pytest.mark.parametrize("lepe", ["input", "value"])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 4)])
def test_global_attention_is_its_definition(lepe, size):
    block = LePEAttention2d(24, num_heads=8, lepe=lepe, dtype=torch.float64)
    torch.nn.init.normal_(block.qkv.weight)
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    q, k, v = block.qkv(x).flatten(1, 2).chunk(3, -1)
    heads = [slice(3 * h, 3 * h + 3) for h in range(8)]
    parts = [(q[..., part] @ k[..., part].mT * 3**-0.5).softmax(-1) @ v[..., part] for part in heads]
    local = x if lepe == "input" else v.unflatten(1, size)
    expected = torch.cat(parts, -1).unflatten(1, size) + block.lepe(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), block.proj(expected))
    assert block.qkv.bias is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiLevelRoutingAttention2d(10, 3), "num_heads to divide dim; got dim 10, heads 3"),
        (lambda: BiLevelRoutingAttention2d(8, 2, lepe_kernel=4), "odd lepe_kernel, .* got 4"),
        (lambda: BiLevelRoutingAttention2d(8, 2, n_win=0), "n_win and topk of at least 1; got 0 and 4"),
        (lambda: BiLevelRoutingAttention2d(8, 2, topk=-2), "got 7 and -2"),
        (lambda: LePEAttention2d(10, 4), "num_heads to divide dim"),
        (lambda: LePEAttention2d(16, lepe="v"), "'input' or 'value'; got 'v'"),
    ],
)
def test_wrong_settings_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
