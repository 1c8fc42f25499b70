"""What heads are like: distances, entropies and importance that are known; and pictures of what queries see."""

import math

import foveate
import numpy as np
import pytest
import timm
import torch
from foveate import blocks
from foveate.tasks import TaskError
from foveate.tasks.pictures import attention
from foveate.tasks.pictures.attention_marks import gate_on_map, queries_of
from torch import nn


def test_equal_weights_have_known_distances_and_entropies():
    model = timm.create_model("nat_atto", embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3, kernel_size=3)
    for module in model.modules():
        if isinstance(module, blocks.NeighborhoodAttention2d):
            nn.init.zeros_(module.qkv.weight[: 2 * module.proj.in_features].data)
            nn.init.zeros_(module.rpb)
    facts = foveate.explain.describe_heads(model, torch.randn(3, 3, 32, 32), batch_size=2)
    assert [(fact.layer, fact.head) for fact in facts] == [
        ("stages.0.blocks.0.attn", 0),
        ("stages.1.blocks.0.attn", 0),
        ("stages.1.blocks.0.attn", 1),
    ]
    for fact in facts:
        assert fact.kind == "neighborhood"
        assert fact.entropy == pytest.approx(math.log2(9), abs=1e-5)
        assert fact.possible == pytest.approx(math.log2(9), abs=1e-9)
        assert fact.outside == pytest.approx(0, abs=1e-6)
    # Tokens of 4 pixels on 8x8: inside, 4 neighbors at 4 pixels and 4 at the diagonal; windows shift at borders.
    places = np.stack(np.mgrid[:8, :8], -1).reshape(64, 2)
    first = np.clip(places - 1, 0, 5)
    keys = first[:, None] + np.stack(np.mgrid[:3, :3], -1).reshape(9, 2)
    expected = 4 * np.linalg.norm(keys - places[:, None], axis=2).mean()
    assert facts[0].distance == pytest.approx(expected, rel=1e-6)


def test_a_head_that_is_all_there_is_loses_all(golden_module):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=4)
    golden_module.fill(model)
    attn = model.blocks[0].attn
    nn.init.zeros_(attn.proj.weight[:, 16:].data)  # nobody reads the second head
    x = torch.randn(8, 3, 32, 32)
    labels = model.eval()(x).argmax(1)
    weight = attn.proj.weight.clone()
    first, second = foveate.explain.describe_heads(model, x, labels)
    assert second.importance == 0
    assert torch.equal(attn.proj.weight, weight)
    with torch.no_grad():
        attn.proj.weight[:, :16] = 0
        lost = 1 - (model(x).argmax(1) == labels).float().mean().item()
        attn.proj.weight.copy_(weight)
    assert first.importance == pytest.approx(lost)
    with pytest.raises(TaskError, match="no attention between positions of that name"):
        foveate.explain.describe_heads(model, x, layers="blocks.7")


PICTURES = {
    "nat_atto": dict(embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3),
    "biformer_tiny": dict(embed_dim=32, depths=(1, 1, 1, 1)),
    "quadtree_b0": dict(embed_dims=(8, 16, 20, 32), depths=(1, 1, 1, 1)),
    "dat_tiny": dict(
        stages=("LS", "S", "LD", "D"), img_size=64, embed_dim=16, num_heads=(1, 2, 2, 4), groups=(1, 1, 2, 4)
    ),
    "litv2_small": dict(embed_dim=16, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1), alpha=0.5),
    "agent_deit_tiny": dict(embed_dim=16, num_heads=2, depth=4, agent_blocks=2, img_size=64),
}
LEGENDS = {
    "nat_atto": "what the query can see",
    "biformer_tiny": "routed regions, numbered by rank",
    "quadtree_b0": "level 2 of the tree, of any head (level 1: everything)",
    "dat_tiny": "sampled points, 49 at most, area by weight, a shape for each group of heads",
    "litv2_small": "what some heads can see; the others see everything",
    "agent_deit_tiny": "agents, area by what the query reads",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "dat_tiny" else pytest.mark.heavy) for n in PICTURES]
)
def test_pictures_show_what_the_kind_is_made_of(name, golden_module):
    model = timm.create_model(name, **PICTURES[name]).eval()
    golden_module.fill(model)
    figure = foveate.explain.picture(model, torch.randn(1, 3, 64, 96), at=[(20, 30), (90, 60)])
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert LEGENDS[name] in texts
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[0] == "query at 20, 30"
    assert len(titles) % 2 == 0


def test_heat_is_on_what_is_seen_and_nowhere_else(golden_module):
    model = timm.create_model("nat_atto", embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3).eval()
    golden_module.fill(model)
    x = torch.randn(1, 3, 64, 64)
    call = attention.drawable(attention.record_once(model, x))[0]
    use = call.use([call.token_at((20, 30))])
    seen = use.seen[0, 0].numpy()
    assert np.argwhere(seen).tolist() == [[row, column] for row in (6, 7, 8) for column in (4, 5, 6)]
    assert use.weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert use.rest.item() == pytest.approx(0, abs=1e-6)
    figure = foveate.explain.picture(model, x, at=(20, 30), layers="stages.0.*")
    shown = figure.axes[1].images[1].get_array()
    assert np.isnan(np.where(np.ma.getmaskarray(shown), np.nan, shown)[~seen]).all()
    for options, words in (
        ({"method": "guess"}, "method is one of"),
        ({"at": (64, 3)}, "not on it"),
    ):
        with pytest.raises(TaskError, match=words):
            foveate.explain.picture(model, x, **options)
    pictures = list(attention.frames(model, x, [(0, 0), (63, 0)], count=2))
    assert pictures[0].size == pictures[1].size
    assert np.abs(np.asarray(pictures[0], int) - np.asarray(pictures[1], int)).max() > 50


def test_a_region_is_the_mean_of_its_queries(golden_module):
    model = timm.create_model("transnext_micro", embed_dim=24, depths=(1, 1, 1, 1))
    golden_module.fill(model.eval())
    x = torch.randn(1, 3, 70, 100)
    mask = np.zeros((70, 100), bool)
    mask[7:33, 39:77] = True
    region = foveate.explain.Region(mask, "box 1: cat")
    call = attention.drawable(attention.record_once(model, x), None)[0]
    queries = queries_of(call, region)
    # Cells of 4 pixels of which half lies within.
    columns = call.map_size[1]
    assert queries == [row * columns + column for row in range(2, 8) for column in range(10, 19)]
    use, (rows, rest) = call.use(queries), call.on_tokens(queries)
    torch.testing.assert_close(use.weights.flatten(2), rows.mean(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(use.rest, rest.mean(2), atol=1e-6, rtol=0)
    assert use.seen.all()
    assert 0 < use.whole.sum() < use.whole.numel()
    figure = foveate.explain.picture(model, x, region, layers="stages.0.*")
    figure.canvas.draw()
    assert figure.axes[0].get_title() == "box 1: cat"
    assert "what is asked about" in [text.get_text() for text in figure.legends[0].get_texts()]
    with pytest.raises(TaskError, match="no part of an image"):
        foveate.explain.picture(model, x, foveate.explain.Region(mask[:, :50], "box 1"))


def test_gates_and_channels_are_drawn_too():
    gated = timm.create_model("van_b0", embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)).eval()
    x = torch.randn(1, 3, 64, 64)
    titles = [axes.get_title() for axes in foveate.explain.picture(gated, x).axes]
    assert sum("gate, map" in title for title in titles) == 4
    call = attention.drawable(attention.record_once(gated, x))[0]
    assert np.array_equal(gate_on_map(call), call.gate[0].mean(0).numpy())
    with pytest.raises(TaskError, match="no heads that look at positions"):
        foveate.explain.picture(gated, x, heads=True)
    dual = timm.create_model("foveate_davit_tiny", depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2)).eval()
    titles = [axes.get_title() for axes in foveate.explain.picture(dual, x).axes]
    assert sum("channel, map" in title for title in titles) == 2
    assert sum("window, map" in title for title in titles) == 2
