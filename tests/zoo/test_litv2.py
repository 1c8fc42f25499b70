"""LITv2: published numbers, deformable patches beside torchvision's, dense settings, any size, checkpoints."""

import foveate
import pytest
import timm
import torch
from foveate.zoo import CheckpointError
from foveate.zoo.litv2 import DeformablePatches, Downsample, LITv2, convert_checkpoint, dense_settings
from foveate.zoo.loading import WithoutInit
from torch import nn
from torchvision.ops import deform_conv2d

PARAMETERS = {
    "litv2_small": 27_844_000,
    "litv2_medium": 48_830_368,
    "litv2_base": 86_520_704,
    "litv2_base_384": 86_520_704,
    "litv2_small_alpha0": 28_089_760,
    "litv2_small_alpha02": 27_844_000,
    "litv2_small_alpha04": 27_696_544,
    "litv2_small_alpha05": 27_647_392,
    "litv2_small_alpha07": 27_696_544,
    "litv2_small_alpha1": 28_089_760,
}
# Of the published dense backbones, for detection and segmentation.
DENSE_PARAMETERS = {
    "litv2_small": (27_076_152, 27_076_344),
    "litv2_medium": (48_062_520, 48_062_712),
    "litv2_base": (85_497_240, 85_497_496),
}
TINY = dict(embed_dim=16, num_heads=(1, 2, 4, 8), depths=(1, 1, 2, 1), alpha=0.5, num_classes=5)


def tiny(**options):
    """A model whose points move."""
    torch.manual_seed(0)
    model = LITv2(**TINY | options).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DeformablePatches):
                module.conv_offset.weight.normal_(std=module.weight[0].numel() ** -0.5)
                module.conv_offset.bias.normal_()
    return model


def test_parameters_are_the_published_number():
    assert sorted(PARAMETERS) == foveate.list_models("litv2_*")
    for name, expected in PARAMETERS.items():
        with WithoutInit():
            model = timm.create_model(name, device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == expected, name
    assert set(dense_settings) == set(DENSE_PARAMETERS)
    for name, expected in DENSE_PARAMETERS.items():
        for setting, count in zip(("detection", "segmentation"), expected, strict=True):
            with WithoutInit():
                model = foveate.create_backbone(name, setting=setting, device="meta")
            assert sum(parameter.numel() for parameter in model.parameters()) == count, (name, setting)


def test_merging_is_the_published_one(open_fixture):
    fixture = open_fixture("hilo/dtm_12x10")
    module = Downsample(32).eval()
    names = {"dconv.": "conv.", "norm_layer.": "norm."}
    state = {}
    for key, value in fixture.state().items():
        start = next(start for start in names if key.startswith(start))
        state[names[start] + key.removeprefix(start)] = value
    module.load_state_dict(state | {"norm.num_batches_tracked": torch.tensor(0)})
    with torch.no_grad():
        out = module(fixture.input().unflatten(1, (12, 10))).flatten(1, 2)
    fixture.assert_output("out", out, 3e-5 * fixture.spec["outputs"]["out"]["std"])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (2, 3)])
def test_patches_are_torchvisions_deformable_convolution(size, gradients):
    torch.manual_seed(0)
    patches = DeformablePatches(6, 10)
    nn.init.normal_(patches.conv_offset.weight)
    x = torch.randn(3, *size, 6, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        image = x.permute(0, 3, 1, 2)
        expected = deform_conv2d(image, patches.conv_offset(image), patches.weight, patches.bias, stride=2)
        out = patches(x).permute(0, 3, 1, 2)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    if gradients:
        inputs = [x, *patches.parameters()]
        theirs = torch.autograd.grad(expected.square().sum(), inputs)
        for ours, expected_grad in zip(torch.autograd.grad(out.square().sum(), inputs), theirs, strict=True):
            torch.testing.assert_close(ours, expected_grad, rtol=1e-3, atol=1e-3)


def test_points_start_where_a_convolution_reads():
    torch.manual_seed(0)
    patches, x = DeformablePatches(6, 10), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = nn.functional.conv2d(x.permute(0, 3, 1, 2), patches.weight, patches.bias, stride=2)
        torch.testing.assert_close(patches(x).permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


def test_points_are_exact_under_autocast():
    """What autocast rounds before and after is compared, not where the points lie."""
    torch.manual_seed(0)
    patches, x = DeformablePatches(8, 16), torch.randn(1, 40, 40, 8)
    nn.init.normal_(patches.conv_offset.weight, std=2.0)
    seen = []
    patches.conv_offset.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        patches(x)
        with torch.autocast("cpu", torch.bfloat16):
            patches(x)
    assert seen[1].dtype == torch.float32
    torch.testing.assert_close(*seen)


def test_offsets_that_are_no_numbers_crash_nothing():
    model, images = tiny(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.stages[1].downsample.conv.conv_offset.bias.fill_(float("nan"))
        assert model(images).isnan().all()
    assert model(images).isnan().all()


@pytest.mark.parametrize("size", [(64, 64), (45, 71), (96, 33), (29, 29)])
def test_any_size_gives_finite_gradients_for_every_parameter(size):
    model = tiny().train()
    model(torch.randn(5, 3, *size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_maps_are_rounded_up_once_and_down_thrice():
    model = tiny()
    with torch.inference_mode():
        maps = model.forward_intermediates(torch.randn(1, 3, 250, 310), intermediates_only=True)
    assert [tuple(x.shape[2:]) for x in maps] == [(63, 78), (31, 39), (15, 19), (7, 9)]
    with pytest.raises(ValueError, match="the image is too small"):
        model(torch.randn(1, 3, 28, 40))


def test_batch_of_images_is_each_image():
    model, images = tiny(), torch.randn(3, 3, 70, 52)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), torch.cat([model(x[None]) for x in images]), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near():
    """At points that don't move: moved ones are, rounded, others."""
    torch.manual_seed(0)
    model, images = LITv2(**TINY).eval(), torch.randn(1, 3, 70, 52)
    with torch.inference_mode():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(images)
        out = model.bfloat16()(images.bfloat16())
    for actual in (autocast, out):
        assert (actual - expected).abs().max() < 0.05 * expected.abs().max() + 0.05


def test_initialisation_runs_again_after_to_empty():
    model = LITv2(**TINY, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert ("conv_offset" in name) <= (not parameter.any()), name


def test_detection_has_no_norm_of_the_first_output():
    """Published so; the output of segmentation is its norm's, and the next stage goes on from the map before it."""
    images, maps = torch.randn(1, 3, 64, 96), {}
    for setting in ("detection", "segmentation"):
        model = tiny(**{k: v for k, v in dense_settings["litv2_small"][setting].items() if k == "out_norms"})
        with torch.inference_mode():
            maps[setting] = model.forward_intermediates(images, intermediates_only=True)
    raw, normed = maps["detection"][0], maps["segmentation"][0]
    torch.testing.assert_close(nn.functional.layer_norm(raw.permute(0, 2, 3, 1), (16,)), normed.permute(0, 2, 3, 1))
    assert (raw - normed).abs().max() > 1e-3
    for one, other in zip(maps["detection"][1:], maps["segmentation"][1:], strict=True):
        torch.testing.assert_close(one, other)


def test_windows_of_four_take_the_same_weights(tmp_path, open_fixture):
    path, images = open_fixture("litv2/litv2_small_det_256x320").checkpoint(tmp_path), torch.randn(1, 3, 64, 96)
    maps = []
    for setting in ("detection", "detection_ws4"):
        net = foveate.create_backbone("litv2_small", setting=setting, checkpoint=path).eval()
        with torch.inference_mode():
            maps.append(net(images))
    torch.testing.assert_close(maps[0][1], maps[1][1])
    assert (maps[0][2] - maps[1][2]).abs().max() > 1e-2


def test_training_files_are_read_out_of_their_wrappers(tmp_path, open_fixture):
    state = open_fixture("litv2/litv2_small_alpha1").state()
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "max_accuracy": 82.0}, tmp_path / "file.pth")
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "file.pth")))
    model = timm.create_model("litv2_small_alpha1", **overlay)
    torch.testing.assert_close(model.stages[1].downsample.conv.weight, state["layers.0.downsample.dconv.weight"])
    with pytest.raises(CheckpointError, match="not one of litv2_small_alpha0"):
        timm.create_model("litv2_small_alpha0", **overlay)
    torch.save({k: v for k, v in state.items() if not k.endswith("running_var")}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="running_var"):
        timm.create_model("litv2_small_alpha1", **overlay)


def test_our_own_names_are_left_alone():
    model = tiny()
    state = model.state_dict()
    assert convert_checkpoint(state, model).keys() == state.keys()
