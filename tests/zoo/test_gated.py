"""ResNet-50 with gates: sizes, where the gates are, the authors' names, weights of the host network."""

import logging

import foveate
import pytest
import timm
import torch
from foveate.blocks import SubspaceAttention
from foveate.zoo import CheckpointError
from torch.nn import functional as F

# CBAM's and triplet attention's are the papers'.
PARAMETERS = {
    "cbam_resnet50": 28_089_624,
    "triplet_resnet50": 25_561_832,
    "psa_p_resnet50": 28_075_752,
    "psa_s_resnet50": 27_687_984,
    "das_resnet50": 28_230_836,
    "ulsam_resnet50": 25_632_744,
}
SMALL = dict(layers=(1, 1, 1, 1), num_classes=5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    net = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[name]
    assert net.layer4[0].se is not None


def test_every_registered_name_is_counted():
    assert set(foveate.zoo.gated.default_cfgs) == set(PARAMETERS)


@pytest.mark.parametrize(("name", "gate"), [("cbam_resnet50", "spatial"), ("triplet_resnet50", "hw")])
def test_the_spatial_gate_s_norm_starts_at_zero_as_published(name, gate):
    block = timm.create_model(name, **SMALL).layer3[0]
    assert not getattr(block.se, gate).conv.bn.weight.any()
    assert block.bn2.weight.all()


def block_by_hand(block, x):
    """A bottleneck as the authors of CBAM and triplet attention write it."""
    out = F.relu(block.bn1(block.conv1(x)))
    out = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(out)))))
    return F.relu(block.se(out) + block.downsample(x))


@pytest.mark.parametrize(
    ("name", "attention", "names"),
    [
        (
            "cbam_resnet50",
            "cbam",
            {
                "channel.fc1.": "ChannelGate.mlp.1.",
                "channel.fc2.": "ChannelGate.mlp.3.",
                "spatial.conv.conv.": "SpatialGate.spatial.conv.",
                "spatial.conv.bn.": "SpatialGate.spatial.bn.",
            },
        ),
        ("triplet_resnet50", "triplet_attention", {}),
        (
            "triplet_resnet50",
            "triplet_attention",
            {
                "cw.conv.": "ChannelGateH.spatial.",
                "hc.conv.": "ChannelGateW.spatial.",
                "hw.conv.": "SpatialGate.spatial.",
            },
        ),
    ],
)
def test_files_with_the_authors_names_load(name, attention, names, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model(name, **SMALL).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {}
    for key, value in net.state_dict().items():
        theirs = key.replace(".se.", f".{attention}.")
        for ours, other in names.items():
            theirs = theirs.replace(f".{attention}.{ours}", f".{attention}.{other}")
        if "ChannelGate.mlp" in theirs:
            value = value.flatten(1) if theirs.endswith("weight") else value
        elif ".cbam.SpatialGate.spatial.conv." in theirs:
            value = value.flip(1)
        state[f"module.{theirs}"] = value
    path = tmp_path / "authors.pth"
    torch.save({"state_dict": state, "epoch": 100}, path)
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **SMALL).eval()
    x = torch.randn(1, 3, 70, 50)
    with torch.inference_mode():
        torch.testing.assert_close(again(x), net(x))
        stem = net.maxpool(net.act1(net.bn1(net.conv1(x))))
        torch.testing.assert_close(net.layer1(stem), block_by_hand(net.layer1[0], stem))
    del state[next(key for key in state if f".{attention}." in key)]
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match="1 missing"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **SMALL)


def test_the_host_s_weights_load_and_the_attention_starts_fresh(tmp_path, caplog):
    donor = timm.create_model("resnet50", **SMALL)
    torch.save(donor.state_dict(), tmp_path / "host.pth")
    overlay = dict(file=str(tmp_path / "host.pth"))
    with caplog.at_level(logging.WARNING):
        net = timm.create_model("psa_s_resnet50", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert "starts fresh" in caplog.text
    assert torch.equal(net.layer2[0].conv2.weight, donor.layer2[0].conv2.weight)


def test_a_subspace_is_its_definition():
    torch.manual_seed(0)
    block = SubspaceAttention(12, num_splits=3).eval()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
    x = torch.randn(2, 12, 5, 7)
    parts = []
    for space, group in zip(block.subspaces, x.split(4, 1), strict=True):
        out = F.max_pool2d(F.relu(space.bn_dws(space.conv_dws(group))), 3, 1, 1)
        out = F.relu(space.bn_point(space.conv_point(out)))
        weights = out.exp() / out.exp().sum((2, 3), keepdim=True)
        parts.append(weights * group + group)
    torch.testing.assert_close(block(x), torch.cat(parts, 1))
    torch.testing.assert_close(torch.jit.script(block)(x), block(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x))
    with pytest.raises(ValueError, match="num_splits must divide the channels; got 12 channels, 5 splits"):
        SubspaceAttention(12, num_splits=5)


@pytest.mark.parametrize("name", ["psa_p_resnet50", "das_resnet50", "ulsam_resnet50"])
def test_features_gradients_and_the_recorder(name):
    net = timm.create_model(name, features_only=True, layers=(1, 1, 1, 1))
    maps = net(torch.randn(2, 3, 70, 50))
    assert [x.shape[2:] for x in maps] == [torch.Size([-(-70 // r), -(-50 // r)]) for r in (2, 4, 8, 16, 32)]
    maps[-1].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    model = timm.create_model(name, **SMALL).eval()
    with foveate.record_attention(model) as record, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert {record[layer].kind for layer in record.layers} == {"gate"}
    assert len(record.layers) == 4
