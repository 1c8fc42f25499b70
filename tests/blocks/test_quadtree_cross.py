"""QuadTree attention between two maps: its definition spelled out, masks, matches, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import QuadTreeCrossAttention2d
from torch.profiler import ProfilerActivity, profile


def attention(kind="B", levels=3, topk=(3, 2), dim=12, heads=2, **options):
    torch.manual_seed(0)
    block = QuadTreeCrossAttention2d(dim, heads, levels, topk, kind, **options).eval()
    if kind == "B":
        torch.nn.init.normal_(block.level_weights)
    return block


def spelled_out(block, x, context):
    """Type A or B, query by query, for one image each, on maps ``[heads, dim, h, w]``."""
    heads, levels = block.num_heads, block.levels
    maps = [layer(part)[0].permute(2, 0, 1) for layer, part in ((block.q, x), (block.k, context), (block.v, context))]
    pyramid = [maps]
    for _ in range(levels - 1):
        pyramid.insert(0, [F.avg_pool2d(part, 2) for part in pyramid[0]])
    shares = block.level_weights.softmax(0) if block.kind == "B" else torch.ones(levels)
    out, handed = 0, {}
    for level, parts in enumerate(pyramid):
        q, k, v = (part.unflatten(0, (heads, -1)) for part in parts)
        tokens = [(row, column) for row in range(k.shape[2]) for column in range(k.shape[3])]
        total, hands = torch.zeros_like(q), {}
        for head in range(heads):
            for row in range(q.shape[2]):
                for column in range(q.shape[3]):
                    groups = [(tokens, 1.0)]
                    if level:
                        parents = handed[head, row // 2, column // 2]
                        groups = [
                            ([(2 * a + i, 2 * b + j) for i in (0, 1) for j in (0, 1)], share)
                            for (a, b), share in parents
                        ]
                        if block.kind == "B":
                            groups = [([token for group, _ in groups for token in group], 1.0)]
                    weights = {}
                    for group, share in groups:
                        keys = torch.stack([k[head, :, a, b] for a, b in group])
                        logits = keys @ q[head, :, row, column] * q.shape[1] ** -0.5
                        weights |= dict(zip(group, logits.softmax(0) * share, strict=True))
                    best = sorted(weights.items(), key=lambda item: -item[1])
                    if level < levels - 1 or (block.kind == "A" and levels == 1):
                        hands[head, row, column] = best[: block.topk[level]]
                        if block.kind == "A":
                            weights |= dict.fromkeys((token for token, _ in hands[head, row, column]), 0.0)
                    total[head, :, row, column] = sum(weight * v[head, :, a, b] for (a, b), weight in weights.items())
        handed = hands
        message = total.flatten(0, 1)[None] * shares[level]
        out = out + F.interpolate(message, scale_factor=2 ** (levels - 1 - level), mode="nearest")
    return block.proj(out.permute(0, 2, 3, 1))


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize(
    ("levels", "size", "other", "topk"),
    [(1, (3, 5), (2, 4), 2), (2, (4, 6), (8, 2), 2), (3, (4, 8), (12, 8), (3, 2)), (3, (8, 4), (4, 8), 50)],
)
def test_is_its_definition(kind, levels, size, other, topk):
    block = attention(kind, levels, topk, context_dim=7).double()
    x, context = torch.randn(1, *size, 12, dtype=torch.float64), torch.randn(1, *other, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x, context), spelled_out(block, x, context))


@pytest.mark.parametrize("kind", ["A", "B"])
def test_padding_changes_nothing(kind):
    """Neither its size nor what lies in it, NaN too; sides that no pyramid halves are padded alike."""
    block = attention(kind)
    sizes, others = [(5, 7), (8, 8)], [(9, 6), (4, 11)]
    pairs = [(torch.randn(1, *a, 12), torch.randn(1, *b, 12)) for a, b in zip(sizes, others, strict=True)]
    x, context = torch.full((2, 12, 9, 12), torch.nan), torch.full((2, 10, 13, 12), torch.nan)
    masks = [torch.zeros(part.shape[:3], dtype=torch.bool) for part in (x, context)]
    for image, pair in enumerate(pairs):
        for part, single, mask in zip((x, context), pair, masks, strict=True):
            height, width = single.shape[1:3]
            part[image, :height, :width], mask[image, :height, :width] = single[0], True
    with torch.no_grad():
        out = block(x, context, *masks)
        for image, (height, width) in enumerate(sizes):
            alone = block(*pairs[image])
            torch.testing.assert_close(out[image, :height, :width], alone[0])
    assert out[~masks[0]].eq(0).all()
    assert all(weights.isfinite().all() for _, weights in block.routes(x, context, *masks))
    masks[1][1] = False
    with torch.no_grad():
        nothing = block(x, context, *masks)
    torch.testing.assert_close(nothing[1, :8, :8], block.proj.bias.expand(8, 8, -1))


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_gradients_of_both_maps(kind, backend):
    block = attention(kind, dim=4, backend=backend).double()
    x = torch.randn(1, 4, 8, 4, dtype=torch.float64, requires_grad=True)
    context = torch.randn(1, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 8, 5, dtype=torch.bool)
    mask[:, 6:] = False
    assert torch.autograd.gradcheck(lambda a, b: block(a, b, context_mask=mask), (x, context))


def test_the_best_match_of_a_shifted_map_is_the_shift():
    block = attention("B", topk=8, dim=16, heads=1)
    for layer in (block.q, block.k):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    context = F.normalize(torch.randn(1, 16, 24, 16), dim=-1) * 30
    x = context[:, 4:12, 8:20]
    finest = block.routes(x, context)[-1]
    best = finest.tokens[:, 0].gather(-1, finest.weights[:, 0].argmax(-1, keepdim=True)).squeeze(-1)
    rows, columns = torch.meshgrid(torch.arange(4, 12), torch.arange(8, 20), indexing="ij")
    assert torch.equal(best[0], rows * 24 + columns)
    torch.testing.assert_close(finest.weights.sum(-1), torch.ones(1, 1, 8, 12))


def test_half_precision_and_compiled():
    block, x, context = attention(levels=2), torch.randn(1, 6, 8, 12), torch.randn(1, 8, 4, 12)
    with torch.no_grad():
        out = block(x, context)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(block(x, context).float(), out, atol=0.05, rtol=0.05)
        program = torch.export.export(block, (x, context)).module()
        torch.testing.assert_close(program(x, context), out)


def test_memory_is_a_tenth_of_the_dense_form_s():
    """Which holds the scores of all pairs and their softmax, if nothing else."""
    block, x, context = attention(dim=64, heads=8), torch.randn(1, 64, 64, 64), torch.randn(1, 48, 80, 64)
    block.topk = [32, 16]
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        block(x, context)
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0 < most < 0.1 * 2 * 8 * (64 * 64) * (48 * 80) * 4
