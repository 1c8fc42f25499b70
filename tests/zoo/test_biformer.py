"""BiFormer: sizes, settings, checkpoints, gradients, graphs, precision, and memory on large images."""

import subprocess
import sys

import foveate
import pytest
import timm
import torch
from foveate.blocks import BiLevelRoutingAttention2d, LePEAttention2d
from foveate.zoo import CheckpointError
from foveate.zoo.weights import find

NAMES = foveate.list_models("biformer*")
# The authors' numbers of parameters, of classifiers and of dense backbones.
PARAMETERS = {
    "biformer_tiny": 13142760,
    "biformer_small": 25536232,
    "biformer_base": 56804968,
    "biformer_stl": 28372552,
    "biformer_stl_nchw": 28372552,
}
DENSE = {"biformer_small": 25024128, "biformer_base": 56037312}
SMALL = dict(embed_dim=32, depths=(1, 1, 2, 1), num_classes=7)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_the_published():
    assert {name: parameters(timm.create_model(name, device="meta")) for name in NAMES} == PARAMETERS
    dense = {name: timm.create_model(name, device="meta", out_norms=True, num_classes=0) for name in DENSE}
    assert {name: parameters(model) for name, model in dense.items()} == DENSE


def test_settings_of_stages_are_the_published():
    model = timm.create_model("biformer_base", device="meta", n_win=8)
    for stage, topk, heads in zip(model.stages, (1, 4, 16, None), (3, 6, 12, 8), strict=True):
        for block in stage.blocks:
            assert isinstance(block.attn, BiLevelRoutingAttention2d if topk else LePEAttention2d)
            assert block.attn.num_heads == heads
            if topk:
                assert (block.attn.topk, block.attn.n_win) == (topk, 8)
    windows = {
        recipe: options["n_win"] for recipe, options in foveate.zoo.biformer.dense_settings["biformer_small"].items()
    }
    assert windows == {"detection": 16, "segmentation": 8, "upernet": 8}


def test_dead_links_are_not_advertised():
    for name, cfg in foveate.zoo.biformer.default_cfgs.items():
        assert not cfg.default.has_weights
        assert find(name).state == "dead"
    assert not timm.list_models("biformer*", pretrained=True)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
@pytest.mark.parametrize("size", [(32, 45), (97, 150), (224, 112)])
def test_any_size_gives_gradients_to_every_parameter(name, size):
    model = timm.create_model(name, **SMALL, drop_path_rate=0.0)
    model(torch.randn(2, 3, *size)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_batched_equals_one_by_one(name):
    model = timm.create_model(name, **SMALL).eval()
    x = torch.randn(3, 3, 130, 99)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]), atol=1e-5, rtol=1e-4)


def test_pieces_of_the_mlp_are_the_same_as_the_whole(monkeypatch):
    model = timm.create_model("biformer_tiny", **SMALL).eval()
    x = torch.randn(1, 3, 70, 83)
    whole = model(x)
    monkeypatch.setattr(foveate.blocks.pointwise, "positions_at_once", lambda x, hidden: 37)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), whole)


def test_wrappers_and_whole_detectors_are_read(open_fixture, tmp_path):
    fixture = open_fixture("biformer/biformer_tiny")
    state = fixture.state()
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(5) for key in state if "running_mean" in key
    }
    expected = timm.create_model(
        "biformer_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=str(fixture.checkpoint(tmp_path)))
    )
    path = tmp_path / "best.pth"
    torch.save({"model": state | counters, "epoch": 299, "max_accuracy": 81.37}, path)
    model = timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert model.norm.num_batches_tracked == 5
    for key, value in expected.state_dict().items():
        if "num_batches" not in key:
            assert torch.equal(model.state_dict()[key], value), key
    dense = open_fixture("biformer/biformer_small_seg_256x320").state()
    detector = {f"backbone.{key}": value for key, value in dense.items()} | {"rpn_head.weight": torch.zeros(3)}
    torch.save({"state_dict": detector}, path)
    backbone = foveate.create_backbone("biformer_small", setting="detection", checkpoint=path)
    assert torch.equal(backbone.features.model.out_norms[2].weight, dense["extra_norms.2.weight"])


def test_own_names_round_trip(tmp_path):
    model = timm.create_model("biformer_stl_nchw", **SMALL).eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    overlay = dict(file=str(tmp_path / "own.pth"))
    again = timm.create_model("biformer_stl_nchw", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL).eval()
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(model(x), again(x))


def nchw_state(model):
    """Rename a model's parameters to those of the published NCHW files."""
    state = {}
    for key, value in model.state_dict().items():
        stage = int(key.split(".")[1]) if key.startswith("stages.") else None
        if key.startswith("stem."):
            key = key.replace("stem.proj", "downsample_layers.0.0").replace("stem.norm", "downsample_layers.0.1")
        elif ".downsample." in key:
            layer = "0" if ".norm." in key else "1"
            key = f"downsample_layers.{stage}.{layer}.{key.rsplit('.', 1)[1]}"
        elif stage is not None:
            if value.ndim == 2:
                value = value[:, :, None, None]
            key = key.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
            if stage < 3:
                key = key.replace("attn.qkv", "attn.qkv_linear").replace("attn.proj", "attn.output_linear")
        state[key.replace("head.fc", "head")] = value
    return state


def test_nchw_files_fit_their_model_and_no_other(tmp_path, open_fixture):
    model = timm.create_model("biformer_stl_nchw").eval()
    state = nchw_state(model)
    assert {"stages.0.blocks.0.attn.qkv_linear.weight", "stages.3.blocks.1.mlp.2.bias"} <= state.keys()
    torch.save(state, tmp_path / "nchw.pth")
    overlay = dict(file=str(tmp_path / "nchw.pth"))
    loaded = timm.create_model("biformer_stl_nchw", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 112, 130)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match="not one of biformer_stl:"):
        timm.create_model("biformer_stl", pretrained=True, pretrained_cfg_overlay=overlay)
    torch.save(open_fixture("biformer/biformer_stl").state(), tmp_path / "stl.pth")
    overlay = dict(file=str(tmp_path / "stl.pth"))
    with pytest.raises(CheckpointError, match="not one of biformer_stl_nchw:"):
        timm.create_model("biformer_stl_nchw", pretrained=True, pretrained_cfg_overlay=overlay)


def test_wrong_settings_are_one_line():
    with pytest.raises(ValueError, match=r"each of 4 stages; got \[1, 4\]"):
        timm.create_model("biformer_tiny", topks=(1, 4))
    with pytest.raises(TypeError, match="auto_pad"):
        timm.create_model("biformer_tiny", auto_pad=True)


def test_start_values():
    torch.manual_seed(0)
    model = timm.create_model("biformer_tiny", num_classes=10)
    block = model.stages[2].blocks[0]
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, model.head.fc):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()
    nchw = timm.create_model("biformer_stl_nchw", num_classes=10)
    mlp = nchw.stages[2].blocks[0].mlp.fc1
    # torch's default of a 1x1 convolution: uniform within 384 ** -0.5.
    assert mlp.weight.std().item() == pytest.approx((3 * 384) ** -0.5, rel=0.05)
    assert mlp.bias.any()
    assert nchw.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    empty = timm.create_model("biformer_tiny", device="meta").to_empty(device="cpu")
    empty.init_weights()
    assert all(value.isfinite().all() for value in empty.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(dtype, open_fixture, tmp_path):
    """At the scale of the fixtures' weights, under which the tiny model's logits have a std of 54."""
    fixture = open_fixture("biformer/biformer_tiny")
    overlay = dict(file=str(fixture.checkpoint(tmp_path)))
    model = timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = fixture.input()
    with torch.inference_mode():
        exact = model(x)
        with torch.autocast("cpu", dtype):
            logits = model(x).float()
    assert logits.isfinite().all()
    assert (logits - exact).std() < (0.2 if dtype == torch.bfloat16 else 0.03) * exact.std()


def test_introspection_of_a_model():
    model = timm.create_model("biformer_tiny", **SMALL).eval()
    seen = {}
    attention = model.stages[1].blocks[0].attn
    attention.register_forward_pre_hook(lambda module, args: seen.update(regions=module.routed_regions(args[0])))
    with torch.inference_mode():
        model(torch.randn(2, 3, 224, 280))
    assert seen["regions"].index.shape == (2, 49, 4)
    assert seen["regions"].grid == (7, 7)
    assert seen["regions"].region_size == (4, 5)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_shapes_are_known_without_computing(name):
    model = timm.create_model(name, **SMALL, device="meta")
    assert model(torch.empty(2, 3, 101, 75, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_whole_graph_compiles(name):
    model = timm.create_model(name, **SMALL).eval()
    x = torch.randn(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    compiled(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_inside_autocast(dtype):
    model = timm.create_model("biformer_tiny", **SMALL)
    with torch.autocast("cpu", dtype):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_traced_graph_gives_the_same(name):
    model = timm.create_model(name, **SMALL).eval()
    x = torch.randn(2, 3, 70, 96)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_exported_program_gives_the_same(name):
    model = timm.create_model(name, **SMALL).eval()
    x = torch.randn(2, 3, 70, 96)
    program = torch.export.export(model, (x,))
    assert not [node for node in program.graph.nodes if "foveate" in str(node.target)]
    torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_onnx_gives_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = timm.create_model(name, **SMALL).eval()
    x = torch.randn(1, 3, 112, 130)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=1e-3)


MEMORY = """
import functools, resource, sys
import foveate.blocks.routing as routing, timm, torch
if sys.argv[1] != "default":
    routing.routed_attention = functools.partial(routing.routed_attention, backend=sys.argv[1])
model = timm.create_model("biformer_small", features_only=True, n_win=int(sys.argv[2])).eval()
with torch.inference_mode():
    model(torch.randn(1, 3, 64, 64))
    image = torch.randn(1, 3, 800, 1344)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(image)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("n_win", [7, 16])
def test_memory_of_a_large_image_is_a_third_of_the_gathers(n_win):
    growth = {}
    for backend in ("default", "reference"):
        command = [sys.executable, "-c", MEMORY, backend, str(n_win)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        growth[backend] = int(done.stdout.split()[-1])
    print({backend: f"{kilobytes / 1024:.0f} MiB" for backend, kilobytes in growth.items()})
    assert growth["default"] <= growth["reference"] / 3
