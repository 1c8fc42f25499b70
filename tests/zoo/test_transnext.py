"""TransNeXt and MoH-ViT: the published sizes, checkpoints, dense settings, linear mode, training."""

import foveate
import pytest
import timm
import torch
from foveate.blocks import collect_losses
from foveate.zoo import CheckpointError
from foveate.zoo.transnext import ConvGlu, dense_settings

# Parameters and entries of the state dict.
PUBLISHED = {
    "transnext_micro": (12_809_304, 617),
    "transnext_tiny": (28_258_960, 617),
    "transnext_small": (49_741_564, 1054),
    "transnext_base": (89_721_496, 1083),
    "transnext_small_384": (49_741_564, 1054),
    "transnext_base_384": (89_721_496, 1083),
    "transnext_micro_AAAA": (13_114_008, 635),
    "moh_transnext_small_75": (49_910_548, 1145),
    "moh_transnext_small_80": (49_910_548, 1145),
    "moh_transnext_base_50": (90_023_512, 1197),
    "moh_transnext_base_75": (90_020_632, 1177),
}
TINY = dict(embed_dim=24, head_dim=12, depths=(1, 1, 1, 1))
MOH = dict(shared_heads=(1, 2, 3, 0), routed_heads=(1, 2, 3, 8))


DEFAULT = ("transnext_micro", "transnext_micro_AAAA")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.heavy) for name in PUBLISHED]
)
def test_variants_are_the_published_ones(name):
    model = timm.create_model(name, device="meta")
    state = model.state_dict()
    assert (sum(parameter.numel() for parameter in model.parameters()), len(state)) == PUBLISHED[name]


def test_all_variants_are_registered_and_dense_ones_have_settings():
    assert set(foveate.list_models("*transnext*")) == set(PUBLISHED)
    assert set(dense_settings) == {"transnext_tiny", "transnext_small", "transnext_base"}
    for settings in dense_settings.values():
        assert set(settings) == {"detection", "dino", "segmentation", "mask2former", "segmentation_extrapolation"}


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "parameters"), [("tiny", 27_681_960), ("small", 49_164_564), ("base", 88_952_496)])
def test_dense_models_are_the_published_ones(name, parameters):
    for setting in dense_settings[f"transnext_{name}"]:
        backbone = foveate.create_backbone(f"transnext_{name}", setting, device="meta")
        assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters


def test_a_file_of_another_variant_or_with_less_is_refused(open_fixture, tmp_path):
    fixture = open_fixture("transnext/transnext_micro")
    state = fixture.state()
    path = tmp_path / "micro.pth"
    torch.save({"model": state, "epoch": 3}, path)
    with pytest.raises(CheckpointError, match="not one of transnext_tiny"):
        timm.create_model("transnext_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    del state["block3.4.attn.cpb_fc1.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"cpb\.fc1\.weight"):
        timm.create_model("transnext_micro", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_a_detectors_file_gives_its_backbone(open_fixture, tmp_path):
    fixture = open_fixture("transnext/transnext_tiny_seg_256x320")
    state = {f"backbone.{key}": value for key, value in fixture.state().items()}
    path = tmp_path / "detector.pth"
    torch.save({"state_dict": {**state, "decode_head.conv.weight": torch.zeros(3)}}, path)
    backbone = foveate.create_backbone("transnext_tiny", "detection", path)
    expected = fixture.state()["block2.1.attn.q.weight"]
    assert torch.equal(backbone.state_dict()["features.model.stages.1.blocks.1.attn.q.weight"], expected)


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (64, 97)])
@pytest.mark.parametrize("options", [{}, {"interpolate": True, "img_size": 64}, MOH], ids=["", "interpolate", "moh"])
def test_any_size(size, options):
    model = timm.create_model("transnext_micro", **TINY, **options, num_classes=5).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        out = model(x)
    torch.testing.assert_close(model(x), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"interpolate": True, "img_size": 96}, MOH], ids=["", "interpolate", "moh"])
def test_scripted_models_compute_the_same(options):
    torch.manual_seed(0)
    model = timm.create_model("transnext_micro", **TINY, **options, num_classes=5).eval()
    x = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        expected = model(x)
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(x), expected)
        torch.testing.assert_close(scripted(x[..., :40]), model(x[..., :40]))
    assert expected.std() > 1e-3


def test_settings_agree_at_the_size_that_they_come_from():
    x = torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    model = timm.create_model("transnext_micro", **TINY, img_size=64, pretrain_size=96).eval()
    resized = timm.create_model("transnext_micro", **TINY, img_size=64, pretrain_size=96, interpolate=True).eval()
    resized.load_state_dict(model.state_dict())
    assert torch.equal(model(x), resized(x))
    wider = torch.randn(1, 3, 64, 96)
    assert not torch.equal(model(wider), resized(wider))


def test_linear_mode_is_the_usual_one_at_its_own_size():
    torch.manual_seed(0)
    model = timm.create_model("transnext_micro", **TINY, img_size=96).eval()
    linear = timm.create_model("transnext_micro", **TINY, img_size=96, fixed_pool_size=3).eval()
    linear.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(linear(x), model(x))
    with pytest.raises(ValueError, match="fixed_pool_size 3 needs maps that are larger; got 2x4"):
        linear(torch.randn(1, 3, 32, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shared_heads=(1, 1, 1, 1)), "both shared_heads and routed_heads"),
        (dict(interpolate=True, fixed_pool_size=3), "leave fixed_pool_size out"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("transnext_micro", **TINY, **options)


@pytest.mark.parametrize("piece_bytes", [2**10, 2**16, 2**30])
def test_the_mlp_in_pieces_is_the_mlp(piece_bytes, monkeypatch):
    monkeypatch.setattr("foveate.zoo.transnext._PIECE_BYTES", piece_bytes)
    mlp, x = ConvGlu(12, 40), torch.randn(3, 7, 9, 12)
    with torch.no_grad():
        pieces = mlp(x)
    torch.testing.assert_close(pieces, mlp(x))


def test_the_balance_of_heads_is_reported_as_published():
    torch.manual_seed(0)
    model = timm.create_model("transnext_micro", **TINY, shared_heads=(1, 2, 3, 16), routed_heads=(1, 2, 3, 0))
    single = [block.attn for stage in model.stages for block in stage.blocks]
    inputs = []
    for attention in single:
        attention.register_forward_pre_hook(lambda module, x: inputs.append((module, x[0])))
    with collect_losses() as own:
        model.train()(torch.randn(2, 3, 64, 64))
    losses = [module.router.route(x)[1] for module, x in inputs]
    losses = torch.stack([loss for loss in losses if loss is not None])
    assert len(losses) == 3
    torch.testing.assert_close(own["balance"], 0.01 * losses.mean())
    own["balance"].backward()
    with collect_losses() as own:
        model.eval()(torch.randn(1, 3, 64, 64))
    assert not own


def test_no_decay_is_the_published_one():
    model = timm.create_model("transnext_micro", **TINY)
    names = model.no_weight_decay()
    prefix = "stages.0.blocks.0.attn."
    for part in ("temperature", "query_embedding", "relative_pos_bias_local", "cpb.fc1.weight"):
        assert prefix + part in names
    for part in ("learnable_tokens", "learnable_bias", "q.weight"):
        assert prefix + part not in names
