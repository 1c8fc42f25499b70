"""Agent-DeiT, -PVT, -Swin and -CSWin: any size, hosts without agents, checkpoints, the published code's mistakes."""

import foveate
import pytest
import timm
import torch
import torch.nn.functional as F
from foveate.blocks import AgentAttention2d
from foveate.zoo import CheckpointError
from foveate.zoo.agent import (
    AgentCSWin,
    AgentDeiT,
    AgentPVT,
    AgentSwin,
    TiledAgentAttention2d,
    convert_checkpoint,
    resize_entry,
)
from foveate.zoo.checkpoint import fit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

PARAMETERS = {
    "agent_deit_tiny": 6_015_640,
    "agent_deit_small": 22_647_112,
    "agent_deit_small_448": 23_070_472,
    "agent_deit_base": 87_204_904,
    "agent_pvt_tiny": 11_570_352,
    "agent_pvt_small": 20_635_066,
    "agent_pvt_medium": 35_921_746,
    "agent_pvt_medium_256": 36_083_682,
    "agent_pvt_large": 48_738_180,
    "agent_swin_tiny": 28_902_964,
    "agent_swin_small": 49_666_684,
    "agent_swin_small_288": 49_707_964,
    "agent_swin_base": 88_095_096,
    "agent_swin_base_384": 88_305_016,
    "agent_cswin_tiny": 20_458_672,
    "agent_cswin_small": 32_814_100,
    "agent_cswin_base": 73_249_696,
    "agent_cswin_base_384": 73_328_416,
}
HOSTS = {
    "deit": (AgentDeiT, dict(embed_dim=16, num_heads=2, depth=4, agent_blocks=2, patch_size=8)),
    "pvt": (AgentPVT, dict(embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(1, 1, 2, 1))),
    "swin": (
        AgentSwin,
        dict(embed_dim=8, num_heads=(1, 2, 4, 8), depths=(1, 2, 2, 2), agent_blocks=(1, 2, 1, 0), window_size=3),
    ),
    "cswin": (
        AgentCSWin,
        dict(
            embed_dim=8, num_heads=(2, 2, 4, 8), depths=(1, 1, 2, 1), agent_blocks=(1, 1, 1, 0), stripes=(1, 2, 3, None)
        ),
    ),
}


def tiny(host, **options):
    cls, config = HOSTS[host]
    torch.manual_seed(0)
    return cls(**dict(img_size=64, num_classes=5, **config) | options).eval()


def strong(model):
    """Draw every bias and position embedding with a deviation at which a wrong one shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_bias", ".rpb", "pos_embed")):
                parameter.normal_(std=0.5)
    return model


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint; return what makes timm read it."""

    def write(checkpoint):
        torch.save(checkpoint, tmp_path / "checkpoint.pth")
        return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "checkpoint.pth")))

    return write


def test_parameters_are_the_published_number():
    assert sorted(PARAMETERS) == foveate.list_models("agent_*")
    for name, expected in PARAMETERS.items():
        model = timm.create_model(name, device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == expected, name


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("size", [(64, 64), (45, 71), (96, 33), (32, 32)])
def test_any_size_gives_finite_gradients_for_every_parameter(host, size):
    model = tiny(host).train()
    model(torch.randn(2, 3, *size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("host", HOSTS)
def test_batch_of_images_is_each_image(host):
    model, images = strong(tiny(host)), torch.randn(3, 3, 70, 52)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), torch.cat([model(x[None]) for x in images]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_bfloat16_is_finite(host):
    model, images = tiny(host), torch.randn(1, 3, 70, 52)
    with torch.inference_mode():
        expected = model(images)
        out = model.bfloat16()(images.bfloat16())
    assert out.dtype == torch.bfloat16
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


@pytest.mark.parametrize("size", [(224, 224), (448, 672)])
def test_without_agents_agent_swin_is_swin(size):
    config = dict(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=7)
    swin = SwinTransformer(img_size=size, window_size=7, **config).eval()
    ours = AgentSwin(agent_blocks=(0, 0, 0, 0), **config).eval()
    with torch.no_grad():
        for name, parameter in swin.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_()
        names = {f"layers.{i}.downsample.": f"layers.{i - 1}.downsample." for i in (1, 2, 3)}
        state = {}
        for key, value in swin.state_dict().items():
            start = next((start for start in names if key.startswith(start)), "")
            state[(names.get(start, "") + key[len(start) :]).replace("head.fc.", "head.")] = value
        ours.load_state_dict(convert_checkpoint(state, ours))
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(ours(images), swin(images), rtol=1e-4, atol=1e-5)


def test_without_agents_agent_deit_is_a_vision_transformer():
    config = dict(embed_dim=16, depth=4, num_heads=2, num_classes=7)
    vit = VisionTransformer(img_size=64, **config).eval()
    ours = AgentDeiT(img_size=64, agent_blocks=0, **config).eval()
    with torch.no_grad():
        vit.head.weight.normal_()
        ours.load_state_dict(convert_checkpoint(vit.state_dict(), ours))
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(ours(images), vit(images), rtol=1e-4, atol=1e-5)
        # Pooled features are the class token, so that forward_head(forward_features(x)) stays the classifier.
        pooled = ours.forward_head(ours.forward_features(images), pre_logits=True)
        torch.testing.assert_close(pooled, vit.forward_features(images)[:, 0], rtol=1e-4, atol=1e-5)
        patches = ours.forward_intermediates(images, norm=True, output_fmt="NHWC", intermediates_only=True)[-1]
        torch.testing.assert_close(patches.flatten(1, 2), vit.forward_features(images)[:, 1:], rtol=1e-4, atol=1e-5)


def test_maps_side_by_side_attend_each_for_itself_in_the_swin_classifier():
    """The published classifier takes 224x448 pixels as two windows of 56x56; its dense model attends to the whole."""
    tiled, whole = TiledAgentAttention2d(16, 2, 3, map_size=6), AgentAttention2d(16, 2, 3, map_size=6)
    whole.load_state_dict(strong(tiled).state_dict())
    with torch.no_grad():
        for size in ((6, 18), (12, 6)):
            x = torch.randn(2, *size, 16)
            parts = [part for rows in x.split(6, 1) for part in rows.split(6, 2)]
            expected = torch.cat([whole(part) for part in parts], 2 if size[0] == 6 else 1)
            torch.testing.assert_close(tiled(x), expected, rtol=1e-5, atol=1e-6)
        for size in ((6, 6), (12, 12), (6, 13), (7, 12)):
            x = torch.randn(2, *size, 16)
            torch.testing.assert_close(tiled(x), whole(x))
    dense, classifier = tiny("swin", out_norms=True), tiny("swin")
    assert not any(isinstance(module, TiledAgentAttention2d) for module in dense.modules())
    assert any(isinstance(module, TiledAgentAttention2d) for module in classifier.modules())


def test_swin_shifts_small_maps_in_the_dense_model_only():
    dense, classifier = tiny("swin", out_norms=True).stages[3].blocks[1], tiny("swin").stages[3].blocks[1]
    classifier.load_state_dict(dense.state_dict())
    dense.attn.rpb.data.normal_()
    classifier.attn.rpb.data.copy_(dense.attn.rpb)
    x = torch.randn(1, 3, 6, dense.norm1.normalized_shape[0])
    unshifted = tiny("swin").stages[3].blocks[0]
    unshifted.load_state_dict(classifier.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(classifier(x), unshifted(x))
        assert (dense(x) - classifier(x)).abs().max() > 1e-3


def test_deit_takes_images_that_are_not_square():
    """The published code infers the grid from the number of tokens, class token included."""
    model = strong(tiny("deit"))
    wide, tall = torch.randn(1, 3, 64, 128), torch.randn(1, 3, 128, 64)
    with torch.inference_mode():
        assert model.forward_features(wide).shape == (1, 8, 16, 16)
        assert model.forward_features(tall).shape == (1, 16, 8, 16)
        assert model.forward_features(torch.randn(1, 3, 57, 66)).shape == (1, 8, 9, 16)


@pytest.mark.parametrize("agent_blocks", [2, 4])
def test_deit_cut_to_features_has_no_unused_parameter(agent_blocks):
    model = strong(tiny("deit", agent_blocks=agent_blocks))
    images = torch.randn(1, 3, 48, 72)
    expected = model.forward_intermediates(images, intermediates_only=True)
    for last in range(4):
        model.prune_intermediate_layers([0, 3 - last], prune_norm=True)
        taps = model.forward_intermediates(images, indices=[0, 3 - last], intermediates_only=True)
        torch.testing.assert_close(taps, [expected[i] for i in sorted({0, 3 - last})])
        torch.testing.assert_close(model(images).permute(0, 3, 1, 2), taps[-1])
        model.zero_grad()
        sum(tap.square().sum() for tap in taps).backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("size", [(448, 448), (112, 448)])
def test_pvt_position_embeddings_are_resized_by_the_stages_own_grid(size):
    """The published dense code compares every stage with the first: it fails at 448x448, and scrambles 112x448."""
    model = strong(AgentPVT(**HOSTS["pvt"][1], num_classes=0).eval())
    maps = []
    embeds = [model.stem, *(stage.downsample for stage in list(model.stages)[1:])]
    for embed in embeds:
        embed.register_forward_hook(lambda module, inputs, output: maps.append((module, inputs[0], output)))
    with torch.inference_mode():
        model(torch.randn(1, 3, *size))
        for i, (embed, x, out) in enumerate(maps):
            height, width = size[0] // (4 * 2**i), size[1] // (4 * 2**i)
            patches = embed.norm(embed.conv(x if i == 0 else x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            table = F.interpolate(embed.pos_embed.permute(0, 3, 1, 2), size=(height, width), mode="bilinear")
            torch.testing.assert_close(out - patches, table.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def test_train_and_eval_return_the_model():
    """The published dense PVT's return None."""
    model = foveate.create_backbone("agent_pvt_tiny", setting="detection", device="meta")
    assert model.train() is model
    assert model.eval() is model


@pytest.mark.parametrize("host", HOSTS)
def test_reset_classifier_needs_no_missing_attribute_and_no_gpu(host):
    """The published PVT's and CSWin's read attributes that don't exist; CSWin's moves the head to cuda."""
    model = tiny(host)
    model.reset_classifier(11)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 11)
    assert model.head.fc.weight.device.type == "cpu"


@pytest.mark.parametrize("host", HOSTS)
def test_maps_of_size_one_are_finite(host):
    with torch.inference_mode():
        assert tiny(host)(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_pvt_says_which_images_it_takes():
    with pytest.raises(ValueError, match="images of at least 32x32"):
        tiny("pvt")(torch.randn(1, 3, 40, 24))


def test_agents_that_do_not_match_are_refused(save):
    """The published code leaves such biases at random with a warning."""
    other = AgentSwin(agents=(4, 4, 7, 7), device="meta").to_empty(device="cpu").state_dict()
    with pytest.raises(CheckpointError, match="of another shape"):
        timm.create_model("agent_swin_tiny", **save(other))


def test_position_embedding_of_another_width_is_refused():
    """The published check compares the width with itself."""
    model = tiny("pvt")
    state = convert_checkpoint({"pos_embed1": torch.randn(1, 9, 12)}, model)
    assert state["stem.pos_embed"].shape[-1] == 12


def published(open_fixture, name):
    return open_fixture(f"agent/{name}").state()


def test_averaged_weights_are_loaded_first_and_buffers_are_dropped(open_fixture, save):
    state = published(open_fixture, "agent_swin_tiny")
    index = torch.zeros(49, 49, dtype=torch.long)
    state["layers.3.blocks.0.attn.relative_position_index"] = index
    state["layers.3.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    averaged = {key: 2 * value if value.is_floating_point() else value for key, value in state.items()}
    checkpoint = {"model": state, "optimizer": {"state": {}}, "state_dict_ema": averaged, "epoch": 299}
    model = timm.create_model("agent_swin_tiny", **save(checkpoint))
    torch.testing.assert_close(model.head.fc.weight, 2 * state["head.weight"])
    model = timm.create_model("agent_swin_tiny", **save({"model": {f"module.{k}": v for k, v in state.items()}}))
    torch.testing.assert_close(model.head.fc.weight, state["head.weight"])


def test_detectors_checkpoint_gives_the_backbone(open_fixture, save):
    state = published(open_fixture, "agent_pvt_tiny_dense")
    detector = {f"backbone.{key}": value for key, value in state.items()} | {"rpn_head.weight": torch.zeros(1)}
    path = save({"state_dict": detector, "meta": {}})["pretrained_cfg_overlay"]["file"]
    net = foveate.create_backbone("agent_pvt_tiny", setting="detection", checkpoint=path)
    attention = net.features.model.stages[2].blocks[1].attn
    torch.testing.assert_close(attention.qkv.weight[:320], state["block3.1.attn.q.weight"])
    torch.testing.assert_close(attention.qkv.weight[320:], state["block3.1.attn.kv.weight"])


def test_classifiers_checkpoint_starts_a_dense_model(open_fixture, save):
    path = save(published(open_fixture, "agent_swin_tiny"))["pretrained_cfg_overlay"]["file"]
    net = foveate.create_backbone("agent_swin_tiny", setting="segmentation", checkpoint=path).eval()
    with torch.inference_mode():
        shapes = [tuple(features.shape) for features in net(torch.randn(1, 3, 50, 70))]
    assert shapes == [(1, 96, 13, 18), (1, 192, 7, 9), (1, 384, 4, 5), (1, 768, 2, 3)]


def test_checkpoint_of_another_image_size_is_resampled():
    """Agent biases along their one axis, tables and position embeddings bicubic, as the published fine-tuning does."""
    for host, other in (("swin", dict(window_size=5)), ("pvt", {}), ("cswin", {}), ("deit", {})):
        small, large = strong(tiny(host)), tiny(host, img_size=(96, 128), **other)
        large.load_state_dict(fit(small.state_dict(), large, host, resize=resize_entry).state)
        small_attention, large_attention = (
            next(module for module in model.modules() if isinstance(module, AgentAttention2d))
            for model in (small, large)
        )
        rows = small_attention.ah_bias[0, :, :, :, 0]
        expected = F.interpolate(rows, size=large_attention.ah_bias.shape[3], mode="linear")
        torch.testing.assert_close(large_attention.ah_bias[0, :, :, :, 0], expected)
        columns = small_attention.wa_bias[0, :, 0].transpose(1, 2)
        expected = F.interpolate(columns, size=large_attention.wa_bias.shape[3], mode="linear")
        torch.testing.assert_close(large_attention.wa_bias[0, :, 0].transpose(1, 2), expected)


def test_own_state_dict_is_left_alone():
    model = tiny("cswin")
    state = model.state_dict()
    converted = convert_checkpoint(state, model)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def test_every_dense_model_has_its_recipes():
    from foveate.zoo.backbone import dense_settings_of

    for name in ("agent_pvt_tiny", "agent_pvt_small", "agent_pvt_medium", "agent_pvt_large"):
        assert {"detection", "retinanet", "segmentation"} == set(dense_settings_of(name))
    for name in ("agent_swin_tiny", "agent_swin_small", "agent_swin_base"):
        assert {"detection", "segmentation"} == set(dense_settings_of(name))


def test_weight_decay_is_the_published_one():
    assert timm.create_model("agent_deit_tiny", device="meta").no_weight_decay() == {"cls_token", "pos_embed"}
    assert timm.create_model("agent_pvt_tiny", device="meta").no_weight_decay() == set()
    swin = timm.create_model("agent_swin_tiny", device="meta").no_weight_decay()
    assert swin == {"stages.3.blocks.0.attn.rpb", "stages.3.blocks.1.attn.rpb"}


@pytest.mark.parametrize("host", HOSTS)
def test_compile_in_one_graph(host):
    model, images = strong(tiny(host)), torch.randn(2, 3, 72, 56)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.heavy  # tests/contract exports a relative of each
@pytest.mark.parametrize("host", HOSTS)
def test_export_and_onnx(host, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = strong(tiny(host)), torch.randn(1, 3, 72, 56)
    with torch.no_grad():
        expected = model(images)
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)
        torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("host", HOSTS)
def test_channels_last_gives_the_same(host):
    cls, options = HOSTS[host]
    model = cls(img_size=64, num_classes=3, **options).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    assert model(x.contiguous(memory_format=torch.channels_last)).allclose(expected, atol=1e-5)


def test_squares_side_by_side_have_the_shapes_and_the_function_of_one():
    cls, options = HOSTS["swin"]
    square, wide = (cls(img_size=size, num_classes=3, **options).eval() for size in (48, (48, 96)))
    wide.load_state_dict(square.state_dict())
    x = torch.randn(1, 3, 48, 96)
    assert torch.equal(wide(x), square(x))
