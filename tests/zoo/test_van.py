"""VAN and MSCAN: every variant's size, preprocessing, dense settings, files, small images, what is not finite."""

import foveate
import pytest
import timm
import torch
from foveate.zoo import CheckpointError, van

# Parameters with 1000 classes and of the dense backbone.
SIZES = {
    "van_b0": (4105800, 3848800),
    "van_b1": (13861800, 13348800),
    "van_b2": (26578472, 26065472),
    "van_b3": (44765608, 44252608),
    "van_b4": (60283176, 59770176),
    "van_b5": (89967688, 89198688),
    "van_b6": (199829416, 199060416),
    "mscan_t": (4160584, 3903584),
    "mscan_s": (13963176, 13450176),
    "mscan_b": (26790824, 26277824),
    "mscan_l": (45149864, 44636864),
}
ENTRIES = {"van_b0": 402, "van_b1": 318, "van_b2": 626, "van_b3": 1102, "van_b4": 1494, "van_b5": 962, "van_b6": 3062}
SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones(name):
    model = timm.create_model(name, device="meta")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (total, total - sum(parameter.numel() for parameter in model.head.parameters())) == SIZES[name]
    assert len(model.state_dict()) == ENTRIES.get(name, len(model.state_dict()))
    assert model.num_classes == 1000


def test_images_are_normalised_as_the_weights_want():
    for name, cfg in van.default_cfgs.items():
        expected = (0.5, 0.5, 0.5) if cfg.tags[0] == "mcg_in1k" else (0.485, 0.456, 0.406)
        first = cfg.cfgs[cfg.tags[0]]
        assert first.mean == expected, name
        assert first.crop_pct == (0.9 if expected[0] == 0.5 else 0.875)
        assert first.first_conv == ("stem.conv1" if name.startswith("mscan") else "stem.conv")
    for name in ("van_b4", "van_b5", "van_b6"):
        cfg = timm.get_pretrained_cfg(f"{name}.mcg_in22k")
        assert (cfg.num_classes, cfg.mean) == (21841, (0.485, 0.456, 0.406))
    assert not timm.get_pretrained_cfg("van_b6.untrained").has_weights


def test_dense_settings():
    for name, settings in van.dense_settings.items():
        for setting, options in settings.items():
            old = setting in ("semantic_fpn", "light_ham", "ham_net")
            assert options["norm_eps"] == (1e-6 if old else 1e-5), (name, setting)
        assert {"detection", "segmentation"} <= settings.keys()
    dense = foveate.create_backbone("van_b0", setting="ham_net")
    assert dense.reductions == [4, 8, 8, 8]
    assert timm.create_model("van_b0").stages[0].norm.eps == 1e-6


def test_output_strides():
    for stride, reductions in ((8, [4, 8, 8, 8]), (16, [4, 8, 16, 16]), (32, [4, 8, 16, 32])):
        model = timm.create_model("van_b0", features_only=True, output_stride=stride, **SMALL).eval()
        assert model.feature_info.reduction() == reductions
        with torch.no_grad():
            maps = model(torch.randn(1, 3, 250, 310))
        assert [x.shape[2:] for x in maps] == [torch.Size([-(-250 // r), -(-310 // r)]) for r in reductions]
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32; got 4"):
        timm.create_model("van_b0", output_stride=4)


@pytest.mark.parametrize("name", ["van_b0", "mscan_t"])
@pytest.mark.parametrize("size", [(1, 1), (2, 33), (40, 56)])
def test_images_of_any_size_down_to_a_pixel(name, size):
    model = timm.create_model(name, num_classes=5, **SMALL).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert model(images).isfinite().all()
        maps = model.forward_intermediates(images, intermediates_only=True)
        assert [x.shape[2:] for x in maps] == [torch.Size([-(-side // r) for side in size]) for r in (4, 8, 16, 32)]
        # An image that is not finite has no answer, and others keep theirs.
        expected = model(images)[0]
        images[1, 0, 0, 0] = float("inf")
        spoilt = model(images)
    torch.testing.assert_close(spoilt[0], expected)
    assert not spoilt[1].isfinite().any()


@pytest.mark.parametrize("name", ["van_b0", "mscan_t"])
def test_the_fast_paths_of_a_cpu_are_the_layers(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **{**SMALL, "embed_dims": (24, 16, 24, 32)}).eval()
    for parameter in model.parameters():  # layer scales that show
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.1)
    images = torch.randn(2, 3, 131, 250)  # large enough for the hidden maps of the first stage to be taken in pieces
    with torch.no_grad():
        fast = model(images)
        # A hook on every layer makes each be called.
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(images), fast, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["van_b0", "mscan_t"])
def test_the_fast_paths_are_taken_under_vmap_too(name):
    model, images = timm.create_model(name, num_classes=5, **SMALL).eval(), torch.randn(2, 3, 140, 150)
    with torch.no_grad():
        mapped = torch.vmap(lambda image: model(image[None])[0])(images)
        torch.testing.assert_close(mapped, model(images), atol=1e-6, rtol=1e-4)


def test_classifiers_start_anew_from_a_backbones_file(open_fixture, tmp_path):
    state = open_fixture("mscan/mscan_t_seg_256x320").state()
    torch.save(state, tmp_path / "mscan_t.pth")
    overlay = {"pretrained": True, "pretrained_cfg_overlay": dict(file=str(tmp_path / "mscan_t.pth"))}
    with pytest.raises(CheckpointError, match="has no classifier: give num_classes=1000"):
        timm.create_model("mscan_t", **overlay)
    model = timm.create_model("mscan_t", num_classes=7, **overlay)
    assert torch.equal(model.stages[3].norm.weight, state["norm4.weight"])
    # A file's head is used where there is one.
    with_head = state | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.arange(1000.0)}
    torch.save({"state_dict": with_head}, tmp_path / "mscan_t.pth")
    assert torch.equal(timm.create_model("mscan_t", **overlay).head.fc.bias, torch.arange(1000.0))


def test_files_of_the_other_network_are_refused(open_fixture, tmp_path):
    for name, other in (("van_b0", "mscan/mscan_t"), ("mscan_t", "van/van_b0"), ("van_b1", "van/van_b0")):
        path = tmp_path / f"{name}.pth"
        torch.save(open_fixture(other).state(), path)
        with pytest.raises(CheckpointError, match=f"not one of {name}"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    block = timm.create_model("van_b0", embed_dims=(32, 64, 128, 256), depths=(1, 1, 1, 1)).stages[3].blocks[0]
    assert torch.equal(block.ls1.gamma, torch.full((256,), 0.01))
    for conv, fan_out in ((block.attn.proj1, 256), (block.attn.gate.dilated, 49), (block.mlp.conv, 9)):
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert not conv.bias.any()
