"""DAT and DAT++: any size, published defects, tables between sizes, checkpoints, compile and export."""

import foveate
import pytest
import timm
import torch
from foveate.blocks.window import WindowAttention2d
from foveate.zoo import CheckpointError
from foveate.zoo.dat import _rename
from timm.data import create_transform, resolve_data_config

# Small relatives of both families with every kind of block in them.
V1 = dict(embed_dim=32, num_heads=(1, 2, 4, 8), groups=(1, 1, 2, 4), stages=("LS", "S", "LDLD", "LD"), num_classes=5)
PP = dict(embed_dim=16, num_heads=(1, 2, 2, 4), groups=(1, 1, 2, 4), stages=("ND", "D", "ND", "DD"), num_classes=5)
SMALL = {"dat_tiny": V1, "dat_pp_tiny": PP, "dat_p_tiny": PP}

PARAMETERS = {
    "dat_tiny": 28_319_138,
    "dat_small": 49_700_402,
    "dat_base": 87_881_632,
    "dat_base_384": 88_178_272,
    "dat_pp_tiny": 23_962_876,
    "dat_pp_small": 53_127_366,
    "dat_pp_base": 93_690_640,
    "dat_pp_base_384": 93_690_640,
    "dat_p_tiny": 22_772_796,
}


def small(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name] | options)


def load(name, path, **options):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **options).eval()


def published_names(model):
    """Turn a model's own state dict into the authors' format, leftovers of their buffers included."""
    own = {}
    for i, stage in enumerate(model.stages):
        own |= {f"down_projs.{i - 1}.{n}": f"stages.{i}.downsample.{n}" for n in ("0.weight",) if i}
        own |= {f"down_projs.{i - 1}.1.norm.{n}": f"stages.{i}.downsample.1.{n}" for n in ("weight", "bias") if i}
        for d, block in enumerate(stage.blocks):
            ours, theirs = f"stages.{i}.blocks.{d}", f"stages.{i}"
            for n in ("weight", "bias"):
                own[f"{theirs}.layer_norms.{2 * d}.norm.{n}"] = f"{ours}.norm1.{n}"
                own[f"{theirs}.layer_norms.{2 * d + 1}.norm.{n}"] = f"{ours}.norm2.{n}"
                for fc in (1, 2):
                    own[f"{theirs}.mlps.{d}.chunk.linear{fc}.{n}"] = f"{ours}.mlp.fc{fc}.{n}"
                names = {"proj_out": "proj"}
                if isinstance(block.attn, WindowAttention2d):
                    names |= {"proj_qkv": "qkv"}
                else:
                    names |= {f"proj_{p}": p for p in "qkv"}
                    names |= {"conv_offset.0": "offset_conv", "conv_offset.1.norm": "offset_norm"}
                for published, mine in names.items():
                    own[f"{theirs}.attns.{d}.{published}.{n}"] = f"{ours}.attn.{mine}.{n}"
            if isinstance(block.attn, WindowAttention2d):
                own[f"{theirs}.attns.{d}.relative_position_bias_table"] = f"{ours}.attn.rpb"
            else:
                own[f"{theirs}.attns.{d}.conv_offset.3.weight"] = f"{ours}.attn.offset_proj.weight"
                own[f"{theirs}.attns.{d}.rpe_table"] = f"{ours}.attn.rpe_table"
    for n in ("weight", "bias"):
        own |= {f"patch_proj.0.{n}": f"stem.0.{n}", f"patch_proj.1.norm.{n}": f"stem.1.{n}"}
        own |= {f"cls_norm.norm.{n}": f"norm.{n}", f"cls_head.{n}": f"head.fc.{n}"}
    state = model.state_dict()
    assert sorted(own.values()) == sorted(state)
    published = {theirs: state[ours] for theirs, ours in own.items()}
    for key, value in published.items():
        if ".chunk." in key and value.ndim == 4:
            published[key] = value[:, :, 0, 0]
        if key.endswith("bias_table"):
            published[key] = value.flip(1, 2).flatten(1).t().contiguous()
    published["stages.0.attns.1.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    published["stages.0.attns.1.attn_mask"] = torch.zeros(64, 49, 49)
    published["stages.2.attns.1.reference"] = published["stages.2.attns.1.q_grid"] = torch.zeros(14, 14, 2)
    return published


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in timm.create_model(name).parameters()) == PARAMETERS[name]


def test_dense_parameter_count_is_the_published_one():
    with torch.device("meta"):
        backbone = foveate.create_backbone("dat_pp_tiny", setting="detection")
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 23_450_772


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (101, 250)])
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_finite_at_any_size(name, size):
    """32 pixels give maps and grids of keys of size 1, where the published code divides by zero."""
    model = small(name, drop_path_rate=0.0)
    model(torch.randn(2, 3, *size)).logsumexp(-1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_convolutions_take_the_smallest_images_and_patches_say_what_they_need():
    assert small("dat_pp_tiny").eval()(torch.randn(1, 3, 5, 1)).isfinite().all()
    for name in ("dat_tiny", "dat_p_tiny"):
        with pytest.raises(ValueError, match="at least 32x32, one patch of the last stage; got 64x31"):
            small(name)(torch.randn(1, 3, 64, 31))


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_batched_equals_one_by_one(name):
    model = small(name).eval()
    images = torch.randn(3, 3, 70, 90)
    torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]), atol=1e-5, rtol=1e-4)


def test_state_holds_no_buffers():
    """The published files carry index tables and float masks of the training size, which break other sizes."""
    for name in SMALL:
        model = small(name)
        assert model.state_dict().keys() == dict(model.named_parameters()).keys()
        assert not list(model.buffers())


def test_initialisation_is_not_dead_code():
    """What the published code starts from: torch's own initialisation and narrow tables; it can be run again."""
    with torch.device("meta"):
        neighborhoods, windows = timm.create_model("dat_pp_tiny"), timm.create_model("dat_tiny")
    for model in (neighborhoods, windows):
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        torch.manual_seed(0)
        model.init_weights()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert 0.009 < model.stages[2].blocks[1].attn.rpe_table.std() < 0.011
        local = model.stages[2].blocks[0].attn
        assert abs(local.rpb.std() - (0.01 if model is windows else 0.02)) < 0.003
        bound = local.qkv.in_features**-0.5
        assert local.qkv.weight.abs().max() <= bound
        assert 0.9 * bound < local.qkv.weight.abs().max()
        assert local.qkv.bias.abs().max() > 0


def test_tables_are_not_decayed_but_for_those_of_neighborhoods():
    for name in ("dat_tiny", "dat_pp_tiny"):
        model = small(name)
        kept = model.no_weight_decay()
        assert kept <= dict(model.named_parameters()).keys()
        assert "stages.2.blocks.1.attn.rpe_table" in kept
        assert ("stages.2.blocks.0.attn.rpb" in kept) == (name == "dat_tiny")


@torch.no_grad()
def test_first_version_takes_other_sizes():
    """A model on images of another size is the model made for that size, its tables resampled."""
    images = torch.randn(1, 3, 160, 97)
    model = small("dat_tiny").eval()
    expected = model(images)
    model.set_input_size((160, 97))
    assert model.stages[2].blocks[1].attn.rpe_table.shape == (4, 19, 11)
    torch.testing.assert_close(model(images), expected)


def test_fine_tuning_at_384_starts_from_224(tmp_path):
    """The published loader for it calls a function without its second argument."""
    model = small("dat_tiny").eval()
    torch.save({"model": published_names(model)}, tmp_path / "dat.pth")
    larger = load("dat_tiny", tmp_path / "dat.pth", **V1 | dict(img_size=384, window_size=12))
    assert larger.stages[2].blocks[1].attn.rpe_table.shape == (4, 47, 47)
    assert larger.stages[0].blocks[1].attn.rpb.shape == (1, 23, 23)
    images = torch.randn(1, 3, 384, 384)
    assert larger(images).isfinite().all()
    same_windows = load("dat_tiny", tmp_path / "dat.pth", **V1 | dict(img_size=384))
    with torch.no_grad():
        torch.testing.assert_close(same_windows(images), model(images))
    torch.save(small("dat_pp_tiny").state_dict(), tmp_path / "pp.pth")
    assert load("dat_pp_tiny", tmp_path / "pp.pth", **PP).stages[0].blocks[1].attn.rpe_table.shape == (1, 111, 111)
    larger = load("dat_pp_tiny", tmp_path / "pp.pth", **PP | dict(img_size=384))
    assert larger.stages[0].blocks[1].attn.rpe_table.shape == (1, 191, 191)


def test_published_names_load_and_buffers_are_left_out(tmp_path):
    model = small("dat_tiny")
    published = published_names(model)
    torch.save({"model": published, "epoch": 299}, tmp_path / "dat.pth")
    loaded = load("dat_tiny", tmp_path / "dat.pth", **V1).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value), key
    del published["stages.2.attns.1.conv_offset.3.weight"]
    torch.save(published, tmp_path / "dat.pth")
    with pytest.raises(CheckpointError, match=r"1 missing \(stages.2.blocks.1.attn.offset_proj.weight\)"):
        load("dat_tiny", tmp_path / "dat.pth", **V1)


def test_a_whole_detector_gives_its_backbone(open_fixture, tmp_path):
    """Released detection files are whole detectors, which the authors' backbone loader cannot read."""
    fixture = open_fixture("dat_pp/dat_pp_tiny_det_256x320")
    state = fixture.state()
    detector = {f"backbone.{key}": value for key, value in state.items()} | {"neck.convs.0.weight": torch.zeros(1)}
    torch.save({"meta": {}, "state_dict": detector}, tmp_path / "detector.pth")
    backbone = foveate.create_backbone("dat_pp_tiny", setting="detection", checkpoint=tmp_path / "detector.pth")
    loaded = backbone.features.model.state_dict()
    assert len(loaded) == len(state)
    assert all(torch.equal(loaded[_rename(key)], value) for key, value in state.items())


def test_stages_of_unknown_blocks_are_refused():
    with pytest.raises(ValueError, match="made of L, S, N and D; got 'X'"):
        small("dat_tiny", stages=("LX", "S", "D", "D"))


@pytest.mark.parametrize(
    ("name", "squashed", "crop"),
    [("dat_tiny", 256, 224), ("dat_base_384", 438, 384), ("dat_pp_base", 256, 224), ("dat_pp_base_384", 384, 384)],
)
def test_evaluation_squashes_as_published(name, squashed, crop):
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    resize, centre = create_transform(**config, is_training=False).transforms[:2]
    assert tuple(resize.size) == (squashed, squashed)
    assert tuple(centre.size) == (crop, crop)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_bfloat16_is_finite_and_near(name):
    model = small(name).eval()
    x = torch.randn(2, 3, 96, 64)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x).float()
    cast = model.to(torch.bfloat16)(x.bfloat16()).float()
    assert (rounded - exact).abs().max() < 0.1
    assert (cast - exact).abs().max() < 0.1


@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
@torch.no_grad()
def test_compiled_equals_eager(name):
    model = small(name).eval()
    x = torch.randn(1, 3, 96, 128)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
def test_inductor_equals_eager_forward_and_backward(name):
    model = small(name, drop_path_rate=0.0)
    x = torch.randn(1, 3, 96, 128)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    model(x).square().sum().backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    compiled(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
@torch.no_grad()
def test_exported_equals_eager(name):
    model = small(name).eval()
    x = torch.randn(1, 3, 96, 128)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.heavy  # tests/contract exports a relative of each
@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
@torch.no_grad()
def test_onnx_equals_eager(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small(name).eval()
    x = torch.randn(1, 3, 96, 128)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), model(x), atol=1e-4, rtol=1e-3)
