"""InLine-DeiT, -PVT, -Swin and -CSWin: published numbers, any size, files of either tenant of the hosts."""

import foveate
import pytest
import timm
import torch
from foveate.blocks.inline import InLineAttention2d
from foveate.zoo import CheckpointError
from foveate.zoo.inline import InLineCSWin, InLineDeiT, InLinePVT, InLineSwin, dense_settings
from foveate.zoo.loading import WithoutInit

PARAMETERS = {
    "inline_deit_tiny": 6_477_736,
    "inline_deit_small": 16_734_760,
    "inline_deit_base": 23_797_096,
    "inline_pvt_tiny": 12_032_232,
    "inline_pvt_small": 21_556_136,
    "inline_pvt_medium": 37_618_856,
    "inline_pvt_large": 51_154_280,
    "inline_swin_tiny": 29_223_544,
    "inline_swin_small": 49_793_296,
    "inline_swin_base": 88_350_120,
    "inline_swin_base_384": 88_465_320,
    "inline_cswin_tiny": 20_604_520,
    "inline_cswin_small": 33_032_872,
    "inline_cswin_base": 73_413_640,
    "inline_cswin_base_384": 73_413_640,
}
HOSTS = {
    "deit": (InLineDeiT, dict(img_size=64, embed_dim=16, num_heads=2, depth=4, patch_size=8)),
    "pvt": (InLinePVT, dict(img_size=64, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(1, 1, 2, 1))),
    "swin": (
        InLineSwin,
        dict(embed_dim=8, num_heads=(1, 2, 4, 8), depths=(1, 2, 2, 2), inline_blocks=(1, 2, 1, 0), window_size=3),
    ),
    "cswin": (
        InLineCSWin,
        dict(
            embed_dim=8, num_heads=(2, 2, 4, 8), depths=(1, 1, 2, 1), inline_blocks=(1, 1, 1, 0), stripes=(1, 2, 3, 3)
        ),
    ),
}


def tiny(host):
    cls, config = HOSTS[host]
    torch.manual_seed(0)
    return cls(num_classes=5, **config).eval()


def test_parameters_are_the_published_number():
    assert sorted(PARAMETERS) == foveate.list_models("inline_*")
    for name, expected in PARAMETERS.items():
        with WithoutInit():
            model = timm.create_model(name, device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == expected, name


def test_published_blocks_are_where_they_are_published():
    """Of the third stage, Swin-Base has two InLine blocks; the stages after have none."""
    for name, counts in {
        "inline_swin_tiny": (2, 2, 6, 0),
        "inline_swin_small": (2, 2, 0, 0),
        "inline_swin_base": (2, 2, 2, 0),
        "inline_swin_base_384": (2, 2, 2, 0),
        "inline_cswin_tiny": (2, 4, 0, 0),
        "inline_cswin_small": (3, 6, 0, 0),
        "inline_cswin_base_384": (3, 6, 0, 0),
        "inline_pvt_large": (3, 8, 27, 3),
        "inline_deit_base": (3, 3, 3, 3),
    }.items():
        with WithoutInit():
            model = timm.create_model(name, device="meta")
        blocks = [[isinstance(block.attn, InLineAttention2d) for block in stage.blocks] for stage in model.stages]
        assert tuple(sum(stage) for stage in blocks) == counts, name
        assert all(stage == sorted(stage, reverse=True) for stage in blocks), name


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("size", [(64, 64), (45, 71), (96, 33)])
def test_any_size_gives_finite_gradients_for_every_parameter(host, size):
    model = tiny(host).train()
    model(torch.randn(2, 3, *size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("host", HOSTS)
def test_batch_of_images_is_each_image(host):
    model, images = tiny(host), torch.randn(3, 3, 70, 52)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), torch.cat([model(x[None]) for x in images]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_near(host, autocast):
    model, images = tiny(host), torch.randn(1, 3, 70, 52)
    with torch.inference_mode():
        expected = model(images)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(images)
        else:
            out = model.bfloat16()(images.bfloat16())
    assert (out - expected).abs().max() < 0.05 * expected.abs().max() + 0.05


@pytest.mark.parametrize("host", HOSTS)
def test_initialisation_runs_again_after_to_empty(host):
    cls, config = HOSTS[host]
    model = cls(**config, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint; return what makes timm read it."""

    def write(checkpoint):
        torch.save(checkpoint, tmp_path / "checkpoint.pth")
        return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "checkpoint.pth")))

    return write


def test_training_files_hold_what_the_authors_recompute_and_their_averages(save, open_fixture):
    """The averaged weights are preferred, mask and index of positions dropped, whatever wraps them."""
    state = open_fixture("inline/inline_swin_tiny").state()
    extra = {
        "layers.3.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
        "layers.2.blocks.1.attn_mask": torch.zeros(4, 49, 49),
    }
    raw = {key: value + 1 for key, value in state.items()}
    path = save({"model": raw, "state_dict_ema": {f"module.{k}": v for k, v in (state | extra).items()}, "epoch": 3})
    model = timm.create_model("inline_swin_tiny", **path)
    torch.testing.assert_close(model.head.fc.weight, state["head.weight"])
    assert not model.load_report.reshaped


def test_files_of_the_other_tenant_are_refused(save, open_fixture):
    with pytest.raises(CheckpointError, match=r"not one of inline_swin_tiny: .* missing \(stages.*residual"):
        timm.create_model("inline_swin_tiny", **save(open_fixture("agent/agent_swin_tiny").state()))
    with pytest.raises(CheckpointError, match=r"not one of agent_swin_tiny: .* unexpected .*residual"):
        timm.create_model("agent_swin_tiny", **save(open_fixture("inline/inline_swin_tiny").state()))


def test_positions_are_resampled_for_another_size(save, open_fixture):
    state = open_fixture("inline/inline_deit_tiny").state()
    model = timm.create_model("inline_deit_tiny", img_size=288, **save(state))
    assert [entry[0] for entry in model.load_report.reshaped] == ["pos_embed"]
    torch.testing.assert_close(model.pos_embed[:, 0], state["pos_embed"][:, 0])


@pytest.mark.parametrize("setting", ["detection", "segmentation"])
def test_dense_settings_start_from_a_classifier(setting, save, open_fixture):
    hosts = ("inline_pvt_", "inline_swin_")
    assert set(dense_settings) == {name for name in PARAMETERS if name.startswith(hosts)} - {"inline_swin_base_384"}
    path = save(open_fixture("inline/inline_swin_tiny").state())["pretrained_cfg_overlay"]["file"]
    net = foveate.create_backbone("inline_swin_tiny", setting=setting, checkpoint=path).eval()
    with torch.inference_mode():
        maps = net(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]
    # Norms of the outputs start as such.
    assert all(x.mean(1).abs().max() < 1e-4 for x in maps)


def test_decay_is_as_published():
    assert timm.create_model("inline_deit_tiny", device="meta").no_weight_decay() == {"cls_token", "pos_embed"}
    assert timm.create_model("inline_pvt_tiny", device="meta").no_weight_decay() == set()
    swin = timm.create_model("inline_swin_tiny", device="meta").no_weight_decay()
    assert swin
    assert all(name.endswith(".rpb") for name in swin)
