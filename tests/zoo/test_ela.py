"""ResNet and MobileNetV2 with ELA: sizes, the published output, weights of the host network."""

import logging

import foveate
import pytest
import timm
import torch
from foveate.blocks import EfficientLocalAttention
from foveate.zoo import CheckpointError

PARAMETERS = {
    "ela_t_resnet18": 11_702_952,
    "ela_b_resnet18": 11_706_792,
    "ela_s_resnet18": 11_770_152,
    "ela_l_resnet18": 11_800_872,
    "ela_t_resnet50": 25_583_464,
    "ela_b_resnet50": 25_591_016,
    "ela_s_resnet50": 25_715_624,
    "ela_l_resnet50": 25_776_040,
    "ela_b_mobilenetv2": 3_568_808,
    "ela_s_mobilenetv2": 3_803_240,
    "ela_l_mobilenetv2": 3_916_904,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_positions(name):
    net = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[name]


def test_every_registered_name_is_counted():
    assert set(foveate.list_models("ela_*")) == set(PARAMETERS)


@pytest.mark.parametrize("name", ["mobilenetv2_ela_l"])
def test_published_mobilenet(name, open_fixture, tmp_path):
    fixture = open_fixture(f"ela/{name}")
    overlay = dict(file=str(fixture.checkpoint(tmp_path)))
    net = timm.create_model("ela_l_mobilenetv2", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        fixture.assert_output("logits", net(fixture.input()), 2e-6)


@pytest.mark.parametrize(
    ("name", "host"),
    [("ela_s_resnet18", "resnet18"), ("ela_t_resnet50", "resnet50"), ("ela_b_mobilenetv2", "mobilenetv2_100")],
)
def test_host_weights_load_and_the_attention_starts_fresh(name, host, tmp_path, caplog):
    donor = timm.create_model(host)
    path = tmp_path / "host.pth"
    torch.save(donor.state_dict(), path)
    with caplog.at_level(logging.WARNING):
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert "the attention" in caplog.text
    assert "starts fresh" in caplog.text
    state, given = net.state_dict(), donor.state_dict()
    assert all(torch.equal(state[key], value) for key, value in given.items())
    assert all(".se." in key for key in state.keys() - given.keys())
    # With the attention out of the way, the network is its host.
    for module in net.modules():
        if isinstance(getattr(module, "se", None), EfficientLocalAttention):
            module.se = torch.nn.Identity()
    x = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        torch.testing.assert_close(net.eval()(x), donor.eval()(x))


def test_host_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "host.pth"
    torch.save(timm.create_model("resnet18").state_dict(), path)
    with pytest.raises(CheckpointError, match="not one of ela_s_resnet50"):
        timm.create_model("ela_s_resnet50", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_attention_of_another_variant_is_refused(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(timm.create_model("ela_t_resnet18").state_dict(), path)
    with pytest.raises(CheckpointError, match="of another shape"):
        timm.create_model("ela_s_resnet18", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_the_tables_say_whose_weights_they_are():
    cfg = timm.create_model("ela_b_resnet18", device="meta").pretrained_cfg
    assert cfg["hf_hub_id"] == "timm/resnet18.a1_in1k"
    assert "attention starts fresh" in cfg["notes"][0]


@pytest.mark.parametrize("name", ["ela_s_resnet18", "ela_s_resnet50", "ela_s_mobilenetv2"])
def test_skip_is_an_option(name):
    default = name != "ela_s_mobilenetv2"
    for options, skip in (({}, default), ({"ela_skip": not default}, not default)):
        net = timm.create_model(name, device="meta", **options)
        assert {m.skip for m in net.modules() if isinstance(m, EfficientLocalAttention)} == {skip}


def test_features_are_those_of_the_host():
    net = foveate.create_backbone("ela_b_resnet50", out_indices=(1, 2, 3, 4))
    assert net.channels == [256, 512, 1024, 2048]
    with torch.inference_mode():
        shapes = [tuple(features.shape) for features in net.eval()(torch.randn(1, 3, 65, 97))]
    assert shapes == [(1, 256, 17, 25), (1, 512, 9, 13), (1, 1024, 5, 7), (1, 2048, 3, 4)]
    assert timm.create_model("ela_b_mobilenetv2", features_only=True).feature_info.channels() == [16, 24, 32, 96, 320]
