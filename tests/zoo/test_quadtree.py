"""QuadTree models: the published sizes, checkpoints, dense recipes, any image size, tracing, precision, the MLP."""

import foveate
import pytest
import timm
import torch
from foveate.zoo import CheckpointError
from foveate.zoo.quadtree import dense_settings

PARAMETERS = {
    "quadtree_b0": (3_589_468, 3_332_468),
    "quadtree_b1": (13_657_788, 13_144_788),
    "quadtree_b2": (25_072_015, 24_559_015),
    "quadtree_b3": (46_264_999, 45_751_999),
    "quadtree_b4": (64_196_997, 63_683_997),
    "quadtree_a_b0": (3_198_280, None),
}
TINY = dict(embed_dims=(8, 16, 20, 32), depths=(1, 2, 1, 1))
TINIEST = TINY | dict(depths=(1, 1, 1, 1))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name):
    count = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
    assert count == PARAMETERS[name][0]
    if PARAMETERS[name][1]:
        backbone = foveate.create_backbone(name, setting="detection", device="meta")
        assert sum(p.numel() for p in backbone.parameters()) == PARAMETERS[name][1]


def test_every_model_is_listed_and_dense_ones_have_recipes():
    assert set(foveate.list_models("quadtree*")) == set(PARAMETERS)
    assert set(dense_settings) == set(PARAMETERS) - {"quadtree_a_b0"}
    for settings in dense_settings.values():
        for recipe in ("detection", "segmentation"):
            assert (settings[recipe]["topk"], settings[recipe]["value_act"]) == (32, "relu")


def test_weights_of_another_depth_are_refused(open_fixture, tmp_path):
    # The authors' table links b2's file for b1: all shapes agree, only blocks are left over.
    state = open_fixture("quadtree/quadtree_b0").state()
    extra = {
        key.replace("block3.1.", "block3.2."): value for key, value in state.items() if key.startswith("block3.1.")
    }
    path = tmp_path / "deeper.pth"
    torch.save(state | extra, path)
    with pytest.raises(CheckpointError, match=r"not one of quadtree_b0: .* unexpected"):
        timm.create_model("quadtree_b0", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_detectors_and_wrapped_checkpoints_load(open_fixture, tmp_path):
    fixture = open_fixture("quadtree/quadtree_b0_dense_256x320")
    state = {f"backbone.{key}": value for key, value in fixture.state().items()} | {"neck.conv.weight": torch.zeros(1)}
    path = tmp_path / "detector.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, path)
    backbone = foveate.create_backbone("quadtree_b0", setting="segmentation", checkpoint=path).eval()
    with torch.inference_mode():
        for i, features in enumerate(backbone(fixture.input())):
            fixture.assert_output(f"stage{i + 1}", features, 1e-5)


def test_detection_may_start_from_a_classifiers_weights(open_fixture, tmp_path):
    checkpoint = open_fixture("quadtree/quadtree_b0").checkpoint(tmp_path)
    dense = foveate.create_backbone("quadtree_b0", setting="detection", checkpoint=checkpoint)
    plain = timm.create_model("quadtree_b0", pretrained=True, pretrained_cfg_overlay=dict(file=str(checkpoint)))
    for key, value in dense.features.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key.removeprefix("model.")]), key


@pytest.mark.parametrize("name", ["quadtree_b0", "quadtree_a_b0"])
@pytest.mark.parametrize("size", [(33, 70), (250, 131)])
def test_trains_at_any_size(name, size):
    model = timm.create_model(name, **TINY, num_classes=5).train()
    model(torch.randn(2, 3, *size)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["quadtree_b0", "quadtree_a_b0"])
def test_images_do_not_mix(name):
    model = timm.create_model(name, **TINY).eval()
    x = torch.randn(3, 3, 97, 130)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), torch.cat([model(image) for image in x.split(1)]), atol=1e-5, rtol=1e-5)


def test_topk_and_activation_change_the_output():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 128, 160)
    outputs = []
    with torch.inference_mode():
        for options in ({}, {"topk": 3}, {"topk": (3, 8, 8, 8)}, {"value_act": "relu"}):
            torch.manual_seed(1)
            outputs.append(timm.create_model("quadtree_b0", **TINY, **options).eval()(x))
    for i, one in enumerate(outputs):
        for other in outputs[i + 1 :]:
            assert not torch.allclose(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_at_published_activations(dtype, open_fixture, tmp_path):
    fixture = open_fixture("quadtree/quadtree_b0")
    overlay = dict(file=str(fixture.checkpoint(tmp_path)))
    model = timm.create_model("quadtree_b0", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        expected = model(fixture.input())
        actual = model.to(dtype)(fixture.input().to(dtype)).float()
    assert actual.isfinite().all()
    assert torch.nn.functional.cosine_similarity(actual, expected).item() > 0.98


def test_init_can_be_repeated_after_to_empty():
    with torch.device("meta"):
        model = timm.create_model("quadtree_b0", **TINY)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    attention = timm.create_model("quadtree_b2").stages[2].blocks[0].attn
    assert attention.qk.weight.std().item() == pytest.approx((2 / 320) ** 0.5, rel=0.02)
    assert attention.lepe[0].weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert attention.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("name", ["quadtree_b0", "quadtree_a_b0"])
def test_exports(name):
    model = timm.create_model(name, **TINIEST).eval()
    x = torch.randn(2, 3, 96, 70)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-5)
        more = torch.randn(5, 3, 96, 70)
        torch.testing.assert_close(program.module()(more), model(more), atol=1e-5, rtol=1e-5)


def test_compiles_as_one_graph_forward_and_backward():
    model = timm.create_model("quadtree_b0", **TINIEST, drop_path_rate=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, 97)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    compiled(x).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for actual, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, atol=1e-3, rtol=1e-3)


def test_a_compiled_model_takes_another_size():
    """A second size makes symbols of the first, and the pyramid's arithmetic on symbols never ends."""
    model = timm.create_model("quadtree_b0", **TINIEST).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in ((64, 97), (96, 64)):
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["quadtree_b0", "quadtree_a_b0"])
def test_onnx_gives_the_same_logits(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm.create_model(name, exportable=True).eval()
    x = torch.randn(1, 3, 224, 224)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(x)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-4, rtol=1e-4)
