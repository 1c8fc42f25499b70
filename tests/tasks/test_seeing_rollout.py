"""Attention carried through networks: published rollouts and relevance, and a map whose mass goes nowhere."""

import foveate
import pytest
import timm
import torch
from foveate.tasks import TaskError

ROLLOUTS = {"mean.cls": {}, "min.cls": {"fuse": "min"}, "max.cls": {"fuse": "max"}, "mean.gap": {"read": "mean"}}


def published(open_fixture, name):
    fixture = open_fixture(f"seeing/{name}")
    model = timm.create_model(fixture.spec["model"])
    model.load_state_dict(fixture.state(), strict=False)
    return fixture, model.train(), fixture.input()


@pytest.mark.parametrize("name", ["vit_tiny", pytest.param("deit_tiny_distilled", marks=pytest.mark.heavy)])
def test_rollouts_are_attention_flows(name, open_fixture):
    fixture, model, x = published(open_fixture, f"{name}_rollout")
    for output, options in ROLLOUTS.items():
        found = foveate.explain.rollout(model, x, **{"read": "class", **options})
        fixture.assert_output(f"rollout.{output}", found[0], 1e-6)
    assert model.training
    auto = foveate.explain.rollout(model, x)
    if name == "vit_tiny":
        torch.testing.assert_close(auto, foveate.explain.rollout(model, x, read="class"))
        for fuse in ("mean", "max"):
            thinned = foveate.explain.rollout(model, x, fuse=fuse, discard=0.9, read="class")[0]
            fixture.assert_output(f"row_normalised.{fuse}.0.9", thinned / thinned.max(), 1e-4)
    else:  # a classifier of two tokens reads both
        assert (auto - foveate.explain.rollout(model, x, read="class")).abs().max() > 1e-7


@pytest.mark.parametrize("name", ["vit_tiny", pytest.param("deit_tiny_distilled", marks=pytest.mark.heavy)])
def test_relevance_is_the_generic_rule(name, open_fixture):
    fixture, model, x = published(open_fixture, f"{name}_relevance")
    target = fixture.spec["notes"]["class_index"]
    fixture.assert_output("generic.cls", foveate.explain.relevance(model, x, target, "class")[0].flatten(), 1e-6)
    fixture.assert_output("generic.gap", foveate.explain.relevance(model, x, target, "mean")[0], 1e-6)
    last = foveate.explain.relevance(model, x, target, "class", layers="blocks.11.*")
    expected = fixture.samples["generic.last_block_only.full.value"]
    index = torch.from_numpy(fixture.samples["generic.last_block_only.full.index"])
    tokens = 196 + fixture.spec["notes"]["prefix_tokens"]
    first = (index < tokens) & (index >= tokens - 196)
    found = last.flatten()[index[first] - (tokens - 196)]
    torch.testing.assert_close(found, torch.from_numpy(expected)[first].float(), atol=1e-6, rtol=0)


@pytest.mark.heavy
def test_a_hierarchy_of_windows_is_composed(open_fixture):
    fixture, model, x = published(open_fixture, "swin_tiny_composed")
    target = fixture.spec["notes"]["class_index"]
    maps = {
        "rollout": foveate.explain.rollout(model, x, every_layer=True),
        "relevance": foveate.explain.relevance(model, x, target, every_layer=True),
        "query": foveate.explain.rollout(model, x, read=(3, 3), every_layer=True),
    }
    for what, found in maps.items():
        assert len(found) == 12
        for stage in range(4):
            name = f"{what}.stage{stage}"
            largest = abs(fixture.samples[f"{name}.value"]).max()
            fixture.assert_output(name, found[f"layers.{stage}.blocks.0.attn"][0], 1e-5 * largest)
    pixels = foveate.explain.rollout(model, x, pixels=True)
    fixture.assert_output("rollout.pixels", pixels[0], 1e-5 * abs(fixture.samples["rollout.pixels.value"]).max())
    torch.testing.assert_close(
        foveate.explain.rollout(model, x, layers="layers.3.*"), maps["rollout"]["layers.3.blocks.0.attn"]
    )


def tiny(name, golden, **options):
    small = dict(embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3)
    model = timm.create_model(name, **{**small, **options}).eval()
    golden.fill(model)
    return model


FAMILIES = {
    "nat_atto": dict(depths=(2, 1), kernel_size=5),
    "biformer_tiny": dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=None),
    "quadtree_b0": dict(embed_dims=(8, 16, 20, 32), depths=(1, 1, 1, 1), embed_dim=None, num_heads=None),
    "dat_pp_tiny": dict(
        stages=("ND", "D", "ND", "D"),
        img_size=64,
        embed_dim=16,
        num_heads=(1, 2, 2, 4),
        groups=(1, 1, 2, 4),
        depths=None,
    ),
    "transnext_micro": dict(embed_dim=24, head_dim=12, depths=(1, 1, 1, 1), img_size=64, num_heads=None),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("nat_atto", "dat_pp_tiny") else pytest.mark.heavy) for name in FAMILIES],
)
def test_a_map_adds_up_to_one_on_every_level(name, golden_module):
    options = {key: value for key, value in FAMILIES[name].items() if value is not None}
    small = dict(embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3)
    small = {key: value for key, value in small.items() if key not in FAMILIES[name]}
    model = timm.create_model(name, **{**small, **options}).eval()
    golden_module.fill(model)
    x = torch.randn(2, 3, 75, 97)
    for options in ({}, {"fuse": "max"}, {"discard": 0.5, "read": (0, 1)}):
        for found in foveate.explain.rollout(model, x, every_layer=True, **options).values():
            torch.testing.assert_close(found.sum((1, 2)), torch.ones(2), atol=1e-5, rtol=0)
    pixels = foveate.explain.rollout(model, x, pixels=True)
    assert pixels.shape == (2, 75, 97)
    torch.testing.assert_close(pixels.sum((1, 2)), torch.ones(2), atol=1e-5, rtol=0)


def test_a_vector_carried_down_is_a_row_of_the_product(golden_module):
    model = tiny("nat_atto", golden_module, depths=(2, 1), kernel_size=5)
    x = torch.randn(1, 3, 40, 60, requires_grad=True)
    with foveate.record_attention(model) as record:
        logits = model(x)
    weights = [call.matrix().double() for call in record.values()]
    gradients = [call.gradient(logits[0, 2]).double() for call in record.values()]
    sizes = [call.map_size for call in record.values()]
    assert sizes == [(10, 15), (10, 15), (5, 8)]
    # The last map of 5x8 is padded to the kernel for 5x8; nothing is for the first.
    means, relevances = [], []
    for weight, gradient, (height, width) in zip(weights, gradients, sizes, strict=True):
        mean = weight.mean(1)[0, :, : height * width]
        means.append((mean / mean.sum(1, keepdim=True) + torch.eye(height * width)) / 2)
        positive = (weight * gradient).clamp(min=0).mean(1)[0, :, : height * width]
        relevances.append(positive + torch.eye(height * width))
    pool = torch.zeros(5, 8, 10, 15, dtype=torch.float64)
    for row in range(5):
        for column in range(8):
            rows, columns = (slice(max(0, 2 * place - 1), 2 * place + 2) for place in (row, column))
            pool[row, column, rows, columns] = 1
    pool = pool.view(40, 150)
    pool = pool / pool.sum(1, keepdim=True)
    start = torch.full((1, 40), 1 / 40, dtype=torch.float64)
    for found, (first, second, last) in (
        (foveate.explain.rollout(model, x), means),
        (foveate.explain.relevance(model, x, 2), relevances),
    ):
        torch.testing.assert_close(
            found.flatten(1).double(), start @ last @ pool @ second @ first, atol=1e-7, rtol=1e-4
        )


def test_classes_are_told_apart_and_batches_are_not_mixed(golden_module):
    model, x = tiny("nat_atto", golden_module), torch.randn(2, 3, 32, 32)
    both = foveate.explain.relevance(model, x, [0, 2])
    torch.testing.assert_close(both[1:], foveate.explain.relevance(model, x[1:], 2), atol=1e-6, rtol=1e-4)
    assert (foveate.explain.relevance(model, x[:1], 1) - both[:1]).abs().max() > 1e-5
    likeliest = model(x).argmax(1)
    torch.testing.assert_close(foveate.explain.relevance(model, x), foveate.explain.relevance(model, x, likeliest))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cant_be_carried_is_refused_by_name(golden_module):
    x = torch.randn(1, 3, 64, 64)
    cait = timm.create_model("cait_xxs24_224", img_size=64, depth=1)
    with pytest.raises(TaskError, match=r"Cait: .*no reader for .*TalkingHeadAttn"):
        foveate.explain.rollout(cait, x)
    inline = tiny("inline_swin_tiny", golden_module, inline_blocks=(1, 0), window_size=2, img_size=64)
    with pytest.raises(TaskError, match=r"may be .*linear attention"):
        foveate.explain.rollout(inline, x)
    assert foveate.explain.relevance(inline, x).shape == (1, 16, 16)
    with pytest.raises(TaskError, match="no attention of VAN mixes positions"):
        foveate.explain.rollout(timm.create_model("van_b0", embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)), x)
    siglip = timm.create_model("vit_base_patch16_siglip_224", img_size=64, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(TaskError, match=r"no reader for .*AttentionPoolLatent"):
        foveate.explain.rollout(siglip, x)
    model = tiny("nat_atto", golden_module)
    for options, words in (
        ({"fuse": "sum"}, "fuse is one of"),
        ({"discard": 1}, "discard is"),
        ({"read": "class"}, "has no class token"),
        ({"read": (8, 0)}, "the last map is 8x8"),
        ({"read": foveate.explain.Pixel(64, 0)}, "the image is 64x64 pixels"),
        ({"layers": "blocks.*"}, "no attention is named"),
    ):
        with pytest.raises(TaskError, match=words):
            foveate.explain.rollout(model, x, **options)


def test_a_pixel_is_read_where_it_lies(golden_module):
    model, x = tiny("nat_atto", golden_module), torch.randn(1, 3, 64, 64)
    # The last map is 8x8.
    position, pixel = (foveate.explain.rollout(model, x, read=read) for read in ((6, 2), foveate.explain.Pixel(20, 50)))
    assert torch.equal(position, pixel)


def test_relevance_without_shortcuts_is_what_attentions_add(golden_module):
    averaged = timm.create_model("nat_atto", embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3).eval()
    golden_module.fill(averaged)
    x = torch.randn(2, 3, 32, 32)
    whole, added = (foveate.explain.relevance(averaged, x, 1, shortcut=shortcut) for shortcut in (True, False))
    assert added.max() > 0
    # Of the 1/N that is read of each position all goes through shortcuts, and none is lost on the way.
    assert (whole - added).sum((1, 2)).tolist() == pytest.approx([1, 1], abs=1e-5)
    of_class = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2).eval()
    golden_module.fill(of_class)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        foveate.explain.relevance(of_class, x, 1, shortcut=False), foveate.explain.relevance(of_class, x, 1)
    )
