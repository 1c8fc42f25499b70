"""Agent attention without training: the formula, which tokens are merged, and when there are agents."""

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import agent_attention_untrained, attend_untrained, match_tokens


def by_hand(x, size, cell, count):
    """Merge one image's tokens, one by one; return them with, for each old token, the new one that it became."""
    height, width = size
    stays = [
        r * width + c for r in range(0, height - cell[0] + 1, cell[0]) for c in range(0, width - cell[1] + 1, cell[1])
    ]
    others = [token for token in range(len(x)) if token not in stays]
    likeness = {(a, b): F.cosine_similarity(x[a], x[b], dim=0).item() for a in others for b in stays}
    target = {a: max(stays, key=lambda b: likeness[a, b]) for a in others}
    ranked = sorted(others, key=lambda a: -likeness[a, target[a]])
    groups = {b: [b] for b in stays}
    for token in ranked[:count]:
        groups[target[token]].append(token)
    rest = ranked[count:]
    merged = torch.stack([*(x[token] for token in rest), *(x[groups[b]].mean(0) for b in stays)])
    became = {token: place for place, token in enumerate(rest)}
    became |= {token: len(rest) + place for place, b in enumerate(stays) for token in groups[b]}
    return merged, [became[token] for token in range(len(x))]


def attend(q, k, v, heads, scale):
    q, k, v = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("size", "cell"), [((8, 8), (4, 4)), ((6, 9), (2, 4)), ((5, 7), (2, 2))])
@pytest.mark.parametrize(("ratio", "agent_ratio"), [(0.4, 0.95), (0.5, 0.8), (0.4, 0.5), (0.0, 1.0)])
def test_is_the_published_form(size, cell, ratio, agent_ratio):
    torch.manual_seed(0)
    heads, dim, tokens = 2, 16, size[0] * size[1]
    layers = [torch.nn.Linear(dim, dim).double() for _ in range(3)]
    to_q, to_k, to_v = layers
    x = torch.randn(3, tokens, dim, dtype=torch.float64)
    sources = tokens - (size[0] // cell[0]) * (size[1] // cell[1])
    count, agent_count = (min(sources, int(tokens * share)) for share in (ratio, agent_ratio))
    with torch.no_grad():
        out = agent_attention_untrained(x, size, heads, *layers, ratio=ratio, agent_ratio=agent_ratio, cell=cell)
        for image, ours in zip(x, out, strict=True):
            merged, became = by_hand(image, size, cell, count)
            q, k, v = to_q(merged), to_k(merged), to_v(merged)
            agents, _ = by_hand(image, size, cell, agent_count)
            d = dim // heads
            if 2 * len(agents) < len(merged):
                gathered = attend(to_q(agents), k, v, heads, d**-0.5)
                expected = attend(q, to_q(agents), gathered, heads, d**-0.15) + 0.075 * v
            else:
                expected = attend(q, k, v, heads, d**-0.5)
            torch.testing.assert_close(ours, expected[became])


def test_any_queries_keys_and_values():
    torch.manual_seed(0)
    q, k, v, agents = (torch.randn(n, 12, dtype=torch.float64) for n in (20, 20, 20, 3))
    ours = attend_untrained(q[None], k[None], v[None], agents[None], 3, spread_power=0.5, shortcut=0.2)[0]
    expected = attend(q, agents, attend(agents, k, v, 3, 0.5), 3, 4**-0.25) + 0.2 * v
    torch.testing.assert_close(ours, expected)


def test_matching_by_chance_and_back():
    x = torch.randn(2, 48, 8)
    matching = match_tokens(x, (6, 8), (2, 2), torch.Generator().manual_seed(0))
    rows, columns = matching.stays // 8 // 2, matching.stays % 8 // 2
    assert (rows * 4 + columns).tolist() == list(range(12))
    assert torch.equal(matching.unmerge(matching.merge(x, 0), 0), x)
    back = matching.unmerge(matching.merge(x, 30), 30)
    first, place = matching.ranked[1, 0], matching.stays[matching.target[1, 0]]
    assert torch.equal(back[1, first], back[1, place])
    with pytest.raises(ValueError, match="got 48 tokens for 5x8"):
        match_tokens(x, (5, 8))
    with pytest.raises(ValueError, match=r"of 0 to 1; got 1\.5"):
        agent_attention_untrained(x, (6, 8), 2, *[torch.nn.Identity()] * 3, ratio=1.5)
