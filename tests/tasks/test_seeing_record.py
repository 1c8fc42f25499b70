"""Recorded attention: published weights, the operators' own key sets, and a model that runs as ever meanwhile."""

import foveate
import pytest
import timm
import torch
from foveate import blocks
from foveate.kernels.neighborhood.window import axis_windows
from foveate.kernels.routing.reference import cut_regions
from foveate.tasks import TaskError
from foveate.tasks.dense.detect import create_detector
from torch import nn

SMALL = {
    "vit_tiny_patch16_224": dict(img_size=(48, 64), embed_dim=32, depth=1, num_heads=2, qk_norm=True),
    "vit_base_patch16_siglip_224": dict(img_size=48, embed_dim=32, depth=1, num_heads=2),
    "deit_tiny_distilled_patch16_224": dict(img_size=48, embed_dim=32, depth=1, num_heads=2),
    "eva02_tiny_patch14_224": dict(img_size=56, embed_dim=32, depth=1, num_heads=2),
    "vit_small_patch16_dinov3": dict(img_size=(48, 64), embed_dim=32, depth=1, num_heads=2),
    "swin_tiny_patch4_window7_224": dict(
        img_size=(64, 84), embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=5, strict_img_size=False
    ),
    "davit_tiny": dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 2)),
    "twins_svt_small": dict(embed_dims=(16, 16, 32, 32), depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2)),
    "pvt_v2_b0": dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2)),
    "pvt_v2_b2_li": dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2)),
    "maxvit_tiny_tf_224": dict(img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=16),
    "maxvit_rmlp_nano_rw_256": dict(img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=16),
}
SIZES = {"vit_base_patch16_siglip_224": (48, 48), "deit_tiny_distilled_patch16_224": (48, 48)}
SIZES |= {"eva02_tiny_patch14_224": (56, 56), "vit_tiny_patch16_224": (48, 64), "vit_small_patch16_dinov3": (48, 64)}
SIZES |= {"swin_tiny_patch4_window7_224": (64, 84), "davit_tiny": (70, 90)}


def seeded(module, golden):
    golden.fill(module)
    return module.eval()


@pytest.mark.parametrize("name", ["vit_tiny", pytest.param("deit_tiny_distilled", marks=pytest.mark.heavy)])
def test_weights_and_their_gradients_are_timms_own(name, open_fixture):
    fixture = open_fixture(f"seeing/{name}_attention")
    model = timm.create_model(fixture.spec["model"]).eval()
    model.load_state_dict(fixture.state(), strict=False)
    notes = fixture.spec["notes"]
    with foveate.record_attention(model) as record:
        logits = model(fixture.input())
    fixture.assert_output("logits", logits, 1e-5)
    for block, layer in enumerate(record.layers):
        call = record[layer]
        assert (layer, call.kind, call.prefix) == (f"blocks.{block}.attn", "global", notes["prefix_tokens"])
        fixture.assert_output(f"attn.{block}", call.matrix(), 1e-5)
        if block % 4 == 3:
            fixture.assert_output(f"grad.{block}", call.gradient(logits[0, notes["class_index"]]), 5e-5)


@pytest.mark.heavy
def test_weights_within_windows_are_timms_own(open_fixture):
    fixture = open_fixture("seeing/swin_tiny_composed")
    model = timm.create_model(fixture.spec["model"]).eval()
    model.load_state_dict(fixture.state(), strict=False)
    with foveate.record_attention(model, ["layers.0.*", "layers.3.blocks.1.*"]) as record:
        logits = model(fixture.input())
    for number, layer in ((0, "layers.0.blocks.0.attn"), (1, "layers.0.blocks.1.attn"), (11, "layers.3.blocks.1.attn")):
        call, block = record[layer], model.get_submodule(layer.removesuffix(".attn"))
        shift = [-part for part in block.shift_size]
        tokens = torch.arange(call.values.shape[2]).view(1, *call.map_size, 1).roll(shift, (1, 2))
        windows = timm.models.swin_transformer.window_partition(tokens, block.window_size).flatten(1)
        within = (slice(None), slice(None), windows[:, :, None], windows[:, None])
        fixture.assert_output(f"weights.block{number}", call.matrix()[within][0].transpose(0, 1), 1e-5)
        gradient = call.gradient(logits[0, fixture.spec["notes"]["class_index"]])
        fixture.assert_output(f"grad.block{number}", gradient[within][0].transpose(0, 1), 5e-5)


@pytest.mark.parametrize("name", SMALL)
def test_timms_attentions_tell_what_they_did(name, golden_module):
    model = seeded(timm.create_model(name, num_classes=5, **SMALL[name]), golden_module)
    x = torch.randn(2, 3, *SIZES.get(name, (64, 64)), generator=torch.Generator().manual_seed(0))
    plain = model(x)
    with foveate.record_attention(model) as record:
        assert torch.equal(model(x), plain)
    expected = {"vit_base_patch16_siglip_224": ["attn_pool"]}
    assert list(record.skipped) == expected.get(name, [])
    for layer in record.layers:
        call = record[layer]
        assert call.check() < 1e-5, layer
        if call.kind == "gate":
            continue
        rows = call.matrix().sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-6, rtol=0)
        if call.kind != "channel":
            place = (x.shape[3] - 1, 7)
            whole = call.at(place).sum((2, 3)) + call.outside(place)
            torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "dilation"), [((9, 11), 1), ((5, 13), 2)])
def test_neighborhoods_are_the_windows_of_the_axes(size, dilation, golden_module):
    attention = seeded(blocks.NeighborhoodAttention2d(16, 2, kernel_size=3, dilation=dilation), golden_module)
    x = torch.randn(2, *size, 16)
    with foveate.record_attention(attention) as record:
        attention(x)
    call, padded = record[""], [max(length, 3 * dilation) for length in size]
    rows, columns = (axis_windows(length, 3, dilation) for length in padded)
    matrix, weights = call.matrix(), attention.attention_map(x)
    expected = torch.zeros(2, 2, *size, *padded)
    for row in range(size[0]):
        for column in range(size[1]):
            at = (slice(None), slice(None), row, column, rows[row][:, None], columns[column][None])
            expected[at] = weights[:, row, column].unflatten(-1, (3, 3))
    expected = expected.flatten(2, 3)
    inside = expected[..., : size[0], : size[1]].flatten(3)
    torch.testing.assert_close(matrix[..., : size[0] * size[1]], inside, atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix[..., size[0] * size[1] :].sum(-1), 1 - inside.sum(-1), atol=1e-6, rtol=0)
    # By itself an attention is given its map, of which a token is a pixel.
    torch.testing.assert_close(call.at((3, 2))[0, 1].flatten(), matrix[0, 1, 2 * size[1] + 3, : size[0] * size[1]])


@pytest.mark.parametrize("ragged", [False, True])
def test_routes_are_those_of_the_regions(ragged, golden_module):
    attention = seeded(blocks.BiLevelRoutingAttention2d(16, 2, n_win=3, topk=2, ragged=ragged), golden_module)
    x = torch.randn(2, 9, 12, 16)
    with foveate.record_attention(attention) as record:
        attention(x)
    weights, regions = attention.attention_map(x), attention.routed_regions(x)
    tokens = cut_regions(torch.arange(9 * 12).view(1, 9, 12, 1), regions.region_size)[0, :, :, 0]
    keys = tokens[regions.index].flatten(2)  # [B, regions, topk * tokens]
    expected = torch.zeros(2, 2, 108, 108)
    for image in range(2):
        for region, queries in enumerate(tokens):
            expected[image, :, queries[:, None], keys[image, region][None]] = weights[image, region]
    torch.testing.assert_close(record[""].matrix(), expected, atol=1e-6, rtol=0)


def test_shifted_windows_see_only_their_own_side():
    attention = blocks.WindowAttention2d(8, 2, window_size=4, shift_size=2)
    with foveate.record_attention(attention) as record:
        attention(torch.randn(1, 8, 8, 8))
    sees = record[""].matrix()[0, 0].view(8, 8, 8, 8) > 0
    # Windows of the rolled map: rows 2-5 together, 6-7 apart from 0-1, which the roll put beside them.
    groups = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])
    same = groups[:, None] == groups
    assert torch.equal(sees, same[:, None, :, None] & same[None, :, None, :])


@pytest.mark.parametrize(("kind", "size"), [("A", (8, 8)), ("B", (8, 8)), ("B", (7, 9))])
def test_levels_of_a_tree_lie_on_the_tokens_that_they_cover(kind, size, golden_module):
    attention = seeded(blocks.QuadTreeAttention2d(16, 2, levels=3, topk=2, kind=kind), golden_module)
    x = torch.randn(1, *size, 16)
    with foveate.record_attention(attention) as record:
        attention(x)
    call = record[""]
    at = call.at((5, 2))
    torch.testing.assert_close(at.sum((2, 3)), torch.ones(1, 2), atol=1e-6, rtol=0)
    if size == (8, 8):
        torch.testing.assert_close(at, attention.attention_map(x, 2, 5), atol=1e-6, rtol=0)
        assert call.values.shape[2] == 64 + 16 + 4
    else:
        assert call.values.shape[2] == 63 + 4 * 6 + 2 * 3


def test_points_lie_on_the_pixels_that_they_were_read_from(golden_module):
    attention = seeded(blocks.DeformableAttention2d(16, 2, stride=2, map_size=(8, 8), offset_range=4), golden_module)
    x = torch.randn(2, 7, 9, 16)
    with foveate.record_attention(attention) as record:
        attention(x)
    call = record[""]
    weights = attention.attention_map(x).flatten(2, 3).flatten(3)
    torch.testing.assert_close(call.matrix(), weights, atol=1e-6, rtol=0)
    points, _ = attention.sampled_points(x)
    grid = points[:, 0] / torch.tensor([8.0, 6.0]) * 2 - 1
    read = nn.functional.grid_sample(x.permute(0, 3, 1, 2), grid, align_corners=True).flatten(2)
    on_map, outside = call.on_tokens(range(63))
    torch.testing.assert_close(on_map @ x.flatten(1, 2)[:, None], weights @ read.mT[:, None], atol=1e-5, rtol=1e-5)
    assert outside.max() > 0.01
    # The values of two groups are at points of both.
    attention = seeded(blocks.DeformableAttention2d(16, 2, groups=2, stride=2, map_size=(8, 8)), golden_module)
    with foveate.record_attention(attention) as record:
        attention(x)
    assert record[""].check() < 1e-5
    torch.testing.assert_close(record[""].at((4, 4)).sum((2, 3)) + record[""].outside((4, 4)), torch.ones(2, 2))


def test_points_on_several_maps_are_read_between_their_pixels(golden_module):
    attention = seeded(blocks.MultiScaleDeformableAttention(16, 2, num_levels=2, num_points=3), golden_module)
    shapes, value = [(4, 5), (8, 9)], torch.randn(2, 20 + 72, 16)
    with foveate.record_attention(attention) as record:
        attention(torch.randn(2, 7, 16), torch.rand(7, 2), value, shapes)
    call = record[""]
    assert (call.kind, call.check() < 1e-5) == ("deformable", True)
    matrix = call.matrix()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 7), atol=1e-6, rtol=0)
    assert matrix[..., -1].max() > 0.01  # some points lie beyond
    with pytest.raises(ValueError, match="maps of two axes"):
        call.at((0, 0))


ALONE = {
    "neighborhood": lambda: blocks.NeighborhoodAttention2d(16, 2, kernel_size=3),
    "window": lambda: blocks.WindowAttention2d(16, 2, window_size=4, shift_size=2),
    "stripes": lambda: blocks.CrossShapedAttention2d(16, 2, stripe=3),
    "routing": lambda: blocks.BiLevelRoutingAttention2d(16, 2, n_win=2, topk=1),
    "quadtree": lambda: blocks.QuadTreeAttention2d(16, 2, levels=2, topk=2),
    "agent": lambda: blocks.AgentAttention2d(16, 2, agents=2, map_size=6, window_size=4),
    "channel": lambda: blocks.ChannelGroupAttention2d(16, 2),
    "global": lambda: blocks.InLineAttention2d(16, 2),
}


@pytest.mark.parametrize("kind", ALONE)
def test_the_gradient_is_that_of_the_matrix(kind, golden_module):
    attention = seeded(ALONE[kind](), golden_module)
    x, weight = torch.randn(1, 7, 9, 16, requires_grad=True), torch.randn(1, 7, 9, 16)
    with foveate.record_attention(attention) as record:
        score = (attention(x) * weight).sum()
    call = record[""]
    assert call.kind == kind
    matrix, local = call.matrix().requires_grad_(), call.local
    mixed = matrix @ call.values
    again = call.recorded.project(mixed if local is None else mixed + local)
    (expected,) = torch.autograd.grad((again * weight).sum(), matrix)
    torch.testing.assert_close(call.gradient(score), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: blocks.EfficientLocalAttention(32),
        lambda: blocks.CBAM(32),
        lambda: blocks.TripletAttention(32),
        lambda: blocks.PolarizedAttention(32),
        lambda: blocks.PolarizedAttention(32, "sequential"),
        lambda: blocks.DeformableGate(32),
        lambda: blocks.DilatedGate(32),
        lambda: blocks.StripGate(32),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_the_input_times_a_gate_is_the_output(make, train, golden_module):
    gate = seeded(make(), golden_module).train(train)
    x = torch.randn(2, 32, 7, 9)
    with foveate.record_attention(gate) as record:
        out = gate(x)
    buffers = [buffer.clone() for buffer in gate.buffers()]
    call = record[""]
    assert call.kind == "gate"
    torch.testing.assert_close(x * call.gate, out, atol=1e-6, rtol=1e-5)
    assert all(map(torch.equal, buffers, gate.buffers()))  # no running statistics from looking
    with pytest.raises(ValueError, match="is a gate"):
        call.matrix()


def test_learned_tokens_and_weights_of_heads_are_told_apart(golden_module):
    inner = blocks.AggregatedAttention2d(16, 2, pretrain_size=7)
    attention = seeded(blocks.MixtureOfHeads2d(inner, 2, 0, 1), golden_module)
    with foveate.record_attention(attention) as record:
        attention(torch.randn(1, 6, 8, 16))
    call = record[""]
    assert (call.kind, call.normalised, call.signed) == ("neighborhood", False, True)
    assert record.skipped == {"attention": "it is recorded as a part of the model"}
    gates = call.details["gates"]
    assert (gates == 0).any()
    torch.testing.assert_close(call.matrix(softmax_only=True).sum(-1), gates, atol=1e-6, rtol=0)
    learned = call.matrix() - call.matrix(softmax_only=True)
    assert learned[..., 48:].abs().max() == 0  # the pooled map's weights have nothing added
    assert learned.abs().max() > 0.01


def test_heads_within_windows_see_no_more(golden_module):
    attention = seeded(blocks.HiLoAttention2d(16, 2, alpha=0.5), golden_module)
    with foveate.record_attention(attention) as record:
        attention(torch.randn(1, 6, 8, 16))
    call = record[""]
    use = call.use([call.token_at((3, 5))])
    within = [(4, 2), (4, 3), (5, 2), (5, 3)]
    assert [tuple(place) for place in use.seen[0, 0].nonzero().tolist()] == within
    assert use.seen[0, 1].all()


def small():
    return timm.create_model("nat_atto", embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3).eval()


def test_layers_are_chosen_by_globs_and_calls_numbered():
    model = small()
    with foveate.record_attention(model, "stages.1.*") as record, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
        model.forward_features(torch.randn(1, 3, 32, 64))
    assert record.layers == ["stages.1.blocks.0.attn", "stages.1.blocks.0.attn#2"]
    assert record.skipped == {}
    first, second = record.values()
    assert first.map_size == (8, 8)
    assert first.at((63, 63)).shape == (1, 2, 64, 64)
    assert second.at((63, 31)).shape == (1, 2, 32, 64)
    with pytest.raises(KeyError, match=r"no recorded attention 'stages\.0"):
        record["stages.0.blocks.0.attn"]
    with pytest.raises(ValueError, match="not on it"):
        second.at((63, 32))


def test_a_token_has_the_pixels_of_its_stage():
    model = timm.create_model("nat_atto", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)).eval()
    with foveate.record_attention(model) as record, torch.no_grad():
        model(torch.randn(1, 3, 33, 40))
    assert [call.map_size for call in record.values()] == [(9, 10), (5, 5), (3, 3), (2, 2)]
    assert [call.pixel_steps() for call in record.values()] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    # The last row of tokens has a single row of pixels.
    call = record["stages.3.blocks.0.attn"]
    assert call.token_at((39, 32)) == 3
    weights = call.matrix()[0, 0, 3, :4].view(2, 2)
    torch.testing.assert_close(call.at((39, 32))[0, 0, 32, 32:], (weights[1, 1] / 8).expand(8))
    torch.testing.assert_close(call.at((39, 32))[0, 0, :32, :32], (weights[0, 0] / 1024).expand(32, 32))


def test_what_is_not_recorded_is_said():
    model = small()
    with (
        pytest.raises(TaskError, match=r"no module of NAT is named 'stage"),
        foveate.record_attention(model, "stage.*"),
    ):
        pass
    with pytest.raises(TaskError, match="was not called"), foveate.record_attention(model):
        pass
    cait = timm.create_model("cait_xxs24_224", img_size=32, depth=1)
    with pytest.raises(TaskError, match=r"no reader for timm.models.cait.TalkingHeadAttn"):
        foveate.record_attention(cait).__enter__()
    attention = timm.layers.Attention(8, 2, attn_drop=0.1).train()
    with pytest.raises(TaskError, match="dropped at random"), foveate.record_attention(attention):
        attention(torch.randn(1, 4, 8))
    with foveate.record_attention(model) as record:
        model.forward_intermediates(torch.randn(1, 3, 32, 32), indices=[0], stop_early=True)
    assert record.skipped == {"stages.1.blocks.0.attn": "it was not called"}


def test_nothing_is_computed_until_it_is_asked_for(monkeypatch):
    model, asked = small(), []
    told = blocks.NeighborhoodAttention2d.recorded
    monkeypatch.setattr(blocks.NeighborhoodAttention2d, "recorded", lambda self, x: asked.append(1) or told(self, x))
    x = torch.randn(1, 3, 32, 32)
    with foveate.record_attention(model) as record:
        model(x)
    assert not asked
    record["stages.1.blocks.0.attn"].at((0, 0))
    assert len(asked) == 1
    attention = blocks.GlobalAttention2d(8, 2)
    x = torch.randn(1, 4, 4, 8)
    with foveate.record_attention(attention) as record:
        attention(x)
    x.add_(1)
    with pytest.raises(TaskError, match="overwritten"):
        record[""].matrix()


def test_compiled_and_checkpointed_models_are_recorded():
    model, x = small(), torch.randn(1, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    expected = compiled(x)
    with foveate.record_attention(compiled) as record:
        torch.testing.assert_close(compiled(x), expected)
    assert record.layers == ["stages.0.blocks.0.attn", "stages.1.blocks.0.attn"]
    model.train().set_grad_checkpointing(True)
    with foveate.record_attention(model) as record:
        score = model(x)[0, 0]
        gradient = record["stages.0.blocks.0.attn"].gradient(score)
    assert len(record) == 2  # the second run of each block, for its gradients, is none
    assert gradient.abs().max() > 0
    with torch.no_grad(), foveate.record_attention(model) as record:
        logits = model(x)
    with pytest.raises(ValueError, match="without gradients"):
        record["stages.0.blocks.0.attn"].gradient(logits[0, 0])


@pytest.mark.parametrize("batch", [False, True])
def test_a_detectors_image_is_what_its_backbone_is_given(batch):
    detector = create_detector("retinanet", "nat_atto", num_classes=2, min_size=96, max_size=200).eval()
    images = torch.rand(1, 3, 50, 71)
    with torch.no_grad(), foveate.record_attention(detector, "backbone.*") as record:
        detector(images if batch else list(images))
    call = record[record.layers[0]]
    # 96 x 136 pixels, padded to 160; a token is one of 4 x 4.
    assert call.image_size == (96, 160)
    assert call.map_size == (24, 40)
    at = call.at((150, 90))
    assert at.shape[2:] == (96, 160)
    torch.testing.assert_close(at.sum((2, 3)) + call.outside((150, 90)), torch.ones(1, call.heads))
