"""QuadTree attention: its definition spelled out, padding, routing, precision."""

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import QuadTreeAttention2d, quadtree
from foveate.blocks.quadtree import from_tree, to_tree


def attention(kind="B", levels=3, topk=2, dim=12, heads=2, **options):
    torch.manual_seed(0)
    return QuadTreeAttention2d(dim, heads, levels, topk, kind, **options).eval()


def spelled_out(block, x):
    """Type A or B for one image, query by query, on maps ``[heads, dim, h, w]`` and with rows and columns."""
    heads, levels, dim = block.num_heads, block.levels, x.shape[-1]
    q, k = block.qk(x).permute(0, 3, 1, 2).chunk(2, 1)
    v = block.v(x).permute(0, 3, 1, 2)
    pyramid = [(q, k, v)]
    for t in range(levels - 1):
        q, k = F.avg_pool2d(q, 2), F.avg_pool2d(k, 2)
        v = F.avg_pool2d(v, 2) if block.kind == "A" else block.value_branches[t](v)
        pyramid.insert(0, (q, k, v))
    shares = block.level_weights.softmax(0) if block.kind == "B" else torch.ones(levels)
    out, handed = 0, {}
    for level, maps in enumerate(pyramid):
        q, k, v = (part[0].unflatten(0, (heads, -1)) for part in maps)
        height, width = q.shape[2:]
        message, hands = torch.zeros_like(v), {}
        for h in range(heads):
            for r in range(height):
                for c in range(width):
                    if level == 0:
                        groups, factors = [[(i, j) for i in range(height) for j in range(width)]], [1.0]
                    else:
                        chosen = handed[h, r // 2, c // 2]
                        groups = [[(2 * a + i, 2 * b + j) for i in (0, 1) for j in (0, 1)] for (a, b), _ in chosen]
                        factors = [share for _, share in chosen]
                        if block.kind == "B":
                            groups, factors = [[token for group in groups for token in group]], [1.0]
                    weights = {}
                    for group, factor in zip(groups, factors, strict=True):
                        logits = torch.stack([q[h, :, r, c] @ k[h, :, i, j] for i, j in group]) * (dim // heads) ** -0.5
                        weights |= dict(zip(group, (logits.softmax(0) * factor).unbind(), strict=True))
                    best = sorted(weights.items(), key=lambda item: -item[1])
                    if level < levels - 1 or (block.kind == "A" and levels == 1):
                        hands[h, r, c] = best[: block.topk[level]]
                        if block.kind == "A":
                            weights |= dict.fromkeys((token for token, _ in hands[h, r, c]), 0.0)
                    message[h, :, r, c] = sum(weight * v[h, :, i, j] for (i, j), weight in weights.items())
        handed, message = hands, message.flatten(0, 1)[None]
        if block.kind == "B":
            message = (message + block.lepe[level](maps[2])) * shares[level]
        out = out + F.interpolate(message, scale_factor=2 ** (levels - 1 - level), mode="nearest")
    return block.proj(out.permute(0, 2, 3, 1))


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize(
    ("levels", "size", "topk"), [(1, (3, 5), 2), (2, (4, 6), 2), (3, (8, 12), (3, 2)), (3, (4, 8), 50)]
)
def test_is_its_definition(kind, levels, size, topk):
    block = attention(kind, levels, topk).double()
    x = torch.randn(1, *size, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), spelled_out(block, x))


def test_tree_order():
    grid = torch.arange(4 * 8).view(1, 4, 8, 1)
    tree = to_tree(grid, 2).flatten()
    assert tree[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    assert tree[16:20].tolist() == [4, 5, 12, 13]
    x = torch.randn(2, 8, 16, 6)
    assert torch.equal(from_tree(to_tree(x, 3, 2), 8, 16, 3), x)


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 4)])
def test_any_size_is_padded_by_its_last_row_and_column(kind, size):
    block = attention(kind, topk=8)
    x = torch.randn(2, *size, 12)
    rows, columns = (torch.arange(-(-n // 4) * 4).clamp(max=n - 1) for n in size)
    with torch.no_grad():
        whole = block(x[:, rows][:, :, columns])
        torch.testing.assert_close(block(x), whole[:, : size[0], : size[1]])


@pytest.mark.parametrize("kind", ["A", "B"])
def test_backward_reaches_everything_and_paths_agree(kind):
    def run(backend):
        block = attention(kind, backend=backend)
        x = torch.randn(2, 7, 10, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        block(x).square().sum().backward()
        return x.grad, *(parameter.grad for parameter in block.parameters())

    for actual, expected in zip(run(None), run("reference"), strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_images_do_not_mix_and_chunks_of_the_coarsest_level_agree(monkeypatch):
    block = attention()
    x = torch.randn(3, 8, 12, 12)
    with torch.no_grad():
        whole = block(x)
        torch.testing.assert_close(whole, torch.cat([block(image) for image in x.split(1)]), atol=1e-6, rtol=1e-5)
        monkeypatch.setattr("foveate.blocks.quadtree._COARSE_BYTES", 1)
        torch.testing.assert_close(block(x), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["A", "B"])
def test_routes_are_children_of_what_the_parent_chose(kind):
    block = attention(kind, levels=3, topk=2)
    x = torch.randn(2, 8, 16, 12)
    routes = block.routes(x)
    assert [tuple(route.tokens.shape) for route in routes] == [(2, 2, 2, 4, 8), (2, 2, 4, 8, 8), (2, 2, 8, 16, 8)]
    fine = routes[2].tokens[1, 0, 5, 9]
    parents = {(token // 16 // 2, token % 16 // 2) for token in fine.tolist()}
    assert len(parents) == 2
    seen = {(token // 8, token % 8) for token in routes[1].tokens[1, 0, 2, 4].tolist()}
    assert parents <= seen
    if kind == "B":
        weights, tokens = routes[1].weights[1, 0, 2, 4], routes[1].tokens[1, 0, 2, 4]
        best = tokens[weights.topk(2).indices].tolist()
        assert parents == {(token // 8, token % 8) for token in best}
        torch.testing.assert_close(routes[2].weights.sum(-1), torch.ones(2, 2, 8, 16))
    map_ = block.attention_map(x, 5, 9)
    assert map_.shape == (2, 2, 8, 16)
    torch.testing.assert_close(map_.sum((2, 3)), torch.ones(2, 2))


@pytest.mark.parametrize("kind", ["A", "B"])
def test_empty_batch(kind):
    with torch.no_grad():
        assert attention(kind)(torch.zeros(0, 5, 7, 12)).shape == (0, 5, 7, 12)


def test_attention_map_refuses_a_position_outside():
    with pytest.raises(ValueError, match=r"the map is 5x7; it has no position \(5, 0\)"):
        attention().attention_map(torch.zeros(1, 5, 7, 12), 5, 0)


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_the_same_tokens(kind, levels, dtype):
    half = attention(kind, levels, topk=3, dim=32).to(dtype)
    full = attention(kind, levels, topk=3, dim=32)
    full.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    x = torch.randn(2, 16, 24, 32).to(dtype)
    with torch.no_grad():
        assert half(x).isfinite().all()
        for low, high in zip(half.routes(x), full.routes(x.float()), strict=True):
            assert torch.equal(low.tokens.sort(-1).values, high.tokens.sort(-1).values)
        # Type A with one level drops its choice, so a wrong choice would show as weights of zero.
        if kind == "A" and levels == 1:
            assert torch.equal(half.routes(x)[0].weights == 0, full.routes(x.float())[0].weights == 0)
        torch.testing.assert_close(half(x).float(), full(x.float()), atol=0.05, rtol=0.1)
        assert half(x).dtype == dtype


def test_autocast_chooses_the_same_tokens():
    block = attention(topk=3, dim=32)
    x = torch.randn(2, 16, 24, 32)
    with torch.no_grad():
        expected = block.routes(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert block(x).isfinite().all()
            lowered = block.routes(x)
    for low, high in zip(lowered, expected, strict=True):
        assert torch.equal(low.tokens.sort(-1).values, high.tokens.sort(-1).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "num_heads to divide dim; got dim 12, heads 5"),
        ({"levels": 0}, "at least 1 level; got 0"),
        ({"kind": "C"}, "kinds 'A' and 'B'; got 'C'"),
        ({"value_act": "silu"}, "value_act is one of 'gelu', 'relu'; got 'silu'"),
        ({"topk": (8,)}, r"2 of them for a pyramid of 3 levels; got \(8,\)"),
        ({"topk": 0}, "topk must be a positive number"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        attention(**options)


def test_topk_may_be_longer_than_the_pyramid():
    x = torch.randn(1, 8, 8, 12)
    with torch.no_grad():
        assert torch.equal(attention(topk=[3, 2, 9, 9])(x), attention(topk=[3, 2])(x))


def test_graphs_of_any_size_split_no_queries():
    """A split into parts of any length has no translation to ONNX that a runtime can run."""

    class Coarsest(torch.nn.Module):
        def forward(self, x):
            return quadtree._coarsest(x, x, x, [2], False, None)[0]

    tokens, x = torch.export.Dim("tokens", min=4), torch.randn(1, 2, 12, 4)
    program = torch.export.export(Coarsest(), (x,), dynamic_shapes=({2: tokens},), strict=False)
    assert not [node for node in program.graph.nodes if "split" in str(node.target)]
    more = torch.randn(1, 2, 30, 4)
    torch.testing.assert_close(program.module()(more), Coarsest()(more))
