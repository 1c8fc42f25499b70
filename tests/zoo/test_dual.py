"""DaViT: sizes, timm's weights both ways, dense files, options, numerics."""

import logging

import foveate
import pytest
import timm
import torch
from foveate.zoo import CheckpointError

PARAMETERS = {
    "foveate_davit_tiny": 28_360_168,
    "foveate_davit_small": 49_745_896,
    "foveate_davit_base": 87_954_408,
    "foveate_davit_large_window12_384": 196_811_752,
    "foveate_davit_huge": 348_922_856,
    "foveate_davit_giant": 1_406_470_120,
}
ATTO = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), num_classes=5)


def atto(**options) -> torch.nn.Module:
    return timm.create_model("foveate_davit_tiny", **ATTO | options)


def count(net) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name):
    assert count(timm.create_model(name, device="meta")) == PARAMETERS[name]


@pytest.mark.parametrize("size", ["huge", pytest.param("giant", marks=pytest.mark.heavy)])
def test_the_largest_are_built_as_timms(size):
    ours, theirs = (timm.create_model(f"{name}davit_{size}", device="meta").eval() for name in ("foveate_", ""))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    with torch.no_grad():
        maps = foveate.create_backbone(f"foveate_davit_{size}", setting="detection", device="meta")(
            torch.empty(1, 3, 96, 64, device="meta")
        )
    assert [x.shape[1:] for x in maps] == [(ours.feature_info[i]["num_chs"], 24 // 2**i, 16 // 2**i) for i in range(4)]
    assert not timm.get_pretrained_cfg(f"foveate_davit_{size}").has_weights


@pytest.mark.parametrize(("name", "parameters"), [("tiny", 27_592_512), ("base", 86_931_200)])
def test_published_dense_parameter_counts(name, parameters):
    net = timm.create_model(f"foveate_davit_{name}", out_norms=True, num_classes=0, device="meta")
    assert count(net) == parameters


@pytest.mark.parametrize(
    ("options", "timms"),
    [
        ({}, {}),
        ({"window_size": 12}, {"window_size": 12}),
        ({"overlapped_patch": True}, {"down_kernel_size": 3}),
        ({"cpe_act": True}, {"cpe_act": True}),
    ],
)
def test_timms_weights_are_ours(options, timms):
    theirs = timm.create_model("davit_tiny", **ATTO, **timms).eval()
    ours = atto(**options).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 203, 131)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_timms_file_loads_through_the_strict_reader(tmp_path):
    theirs = timm.create_model("davit_tiny", **ATTO)
    path = tmp_path / "timm.pth"
    torch.save(theirs.state_dict(), path)
    ours = atto(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    with pytest.raises(CheckpointError, match="not one of foveate_davit_tiny"):
        atto(mlp_ratio=2.0, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def authors_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename our dense state dict to the authors'."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("stem.", "patch_embeds.0.").replace(".blocks.", ".")
        if ".downsample." in key:
            key = key.replace("stages.", "patch_embeds.").replace(".downsample.", ".")
        key = key.replace("stages.", "main_blocks.").replace("out_norms.", "norm").replace("head.fc.", "head.")
        renamed[key.replace("cpe1", "cpe.0").replace("cpe2", "cpe.1").replace(".conv.", ".proj.")] = value
    return renamed


def test_retinanets_file_may_lack_the_first_norm(tmp_path, caplog):
    state = authors_names(atto(out_norms=True, num_classes=0).state_dict())
    state = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("norm0")}
    path = tmp_path / "retinanet.pth"
    torch.save({"state_dict": state}, path)
    options = {key: value for key, value in ATTO.items() if key != "num_classes"}
    with caplog.at_level(logging.WARNING):
        net = foveate.create_backbone(
            "foveate_davit_tiny", setting="detection", checkpoint=path, out_indices=(1, 2, 3), **options
        )
    assert "no norm of the first stage's output" in caplog.text
    assert net.channels == [16, 24, 32]
    del state["backbone.norm2.weight"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(out_norms.2.weight\)"):
        foveate.create_backbone("foveate_davit_tiny", setting="detection", checkpoint=path, **options)


def test_every_sub_block_has_its_own_drop_path():
    """12 rates for the tiny model, from none to the given one (timm has 6, the same for both of a pair)."""
    net = timm.create_model("foveate_davit_tiny", device="meta")
    rates = [
        (getattr(block.drop_path1, "drop_prob", 0.0), getattr(block.drop_path2, "drop_prob", 0.0))
        for stage in net.stages
        for dual in stage.blocks
        for block in dual
    ]
    assert [attention for attention, _ in rates] == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert all(attention == mlp for attention, mlp in rates)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlapped_patch": True},
        {"cpe_act": True},
        {"ffn": False},
        {"attention_types": ("channel", "spatial")},
        {"attention_types": ("spatial",)},
        {"out_norms": True},
    ],
)
def test_options_train_at_odd_sizes(options):
    net = atto(drop_path_rate=0.0, **options)
    net(torch.randn(2, 3, 75, 101)).square().sum().backward()
    unused = {"out_norms.0", "out_norms.1", "out_norms.2"}
    for name, parameter in net.named_parameters():
        if name.rpartition(".")[0] not in unused:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_overlapped_merge_has_kernel_3():
    assert atto(overlapped_patch=True).stages[1].downsample.conv.kernel_size == (3, 3)
    with pytest.raises(ValueError, match="'spatial' or 'channel'"):
        atto(attention_types=("spatial", "temporal"))
    with pytest.raises(TypeError):
        atto(shift_size=3)


def test_batched_is_per_image():
    net = atto().eval()
    x = torch.randn(3, 3, 67, 93)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), torch.cat([net(image[None]) for image in x]), atol=1e-5, rtol=1e-4)


def test_bfloat16_is_finite():
    with torch.inference_mode():
        out = atto().eval().bfloat16()(torch.randn(1, 3, 67, 93).bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_compiles_and_exports():
    net = atto().eval()
    x = torch.randn(1, 3, 67, 93)
    with torch.inference_mode():
        expected = net(x)
        torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)


@pytest.mark.heavy
def test_onnx(tmp_path):
    import onnxruntime

    net = atto().eval()
    x = torch.randn(1, 3, 67, 93)
    path = tmp_path / "davit.onnx"
    torch.onnx.export(net, (x,), path, dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(out), net(x), atol=1e-4, rtol=1e-4)
