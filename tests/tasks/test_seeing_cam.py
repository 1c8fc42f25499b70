"""Class activation maps are pytorch-grad-cam's, at a layer where there is something to see."""

import foveate
import pytest
import timm
import torch
from foveate.tasks import TaskError
from foveate.tasks.seeing import cam
from torch import nn

METHODS = {"gradcam": "grad_cam", "gradcampp": "grad_cam_plus_plus", "layercam": "layer_cam"}
LAYERS = {
    "resnet18_layer4_cams": "layer4",
    "swin_tiny_norm_cams": "norm",
    "swin_tiny_last_norm1_cams": "layers.3.blocks.1.norm1",
    "vit_tiny_last_norm1_cams": "blocks.11.norm1",
}
DEFAULTS = ("resnet18_layer4_cams", "swin_tiny_norm_cams", "vit_tiny_last_norm1_cams")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.heavy if name.startswith("swin") else ()) for name in LAYERS],
)
def test_maps_are_the_published_ones(name, open_fixture):
    fixture = open_fixture(f"seeing/{name}")
    model = timm.create_model(fixture.spec["model"])
    model.load_state_dict(fixture.state(), strict=False)
    x, target = fixture.input(), fixture.spec["notes"]["class_index"]
    if name in DEFAULTS:
        assert cam.cam_layer(model.eval(), x, target) == LAYERS[name]
    for method, function in METHODS.items():
        explain = getattr(foveate.explain, function)
        raw = explain(model, x, target, LAYERS[name], raw=True)
        largest = torch.from_numpy(fixture.samples[f"{method}.raw.value"]).abs().max().item()
        fixture.assert_output(f"{method}.raw", raw, 1e-5 * largest)
        if (method == "gradcam") == (name in DEFAULTS):  # the finish is the same for all
            fixture.assert_output(method, explain(model, x, target, None if name in DEFAULTS else LAYERS[name]), 1e-4)
    assert model.training is (name not in DEFAULTS)


def filled(name, open_fixture, **options):
    model = timm.create_model(name, **options).eval()
    open_fixture("seeing/knn").golden.fill(model)
    return model


# What is averaged, normalised where the norm comes first; and where a token is read, what the last attention reads.
EXPECTED = {
    "convnext_atto": "stages",
    "efficientnet_lite0": "bn2",
    "mobilenetv3_small_050": "blocks",
    "pvt_v2_b0": "stages",
    "deit_tiny_distilled_patch16_224": "blocks.11.norm1",
    "cait_xxs24_224": "blocks_token_only.1.norm1",
    "xcit_nano_12_p16_224": "cls_attn_blocks.1.norm1",
    "nat_atto": "norm",
    "quadtree_b0": "stages",
    "foveate_host_atto": "norm",
    "agent_deit_tiny": "stages.3.blocks.2.norm1",  # a map whose mean is the class token's
}


LARGE = {"cait_xxs24_224", "xcit_nano_12_p16_224", "deit_tiny_distilled_patch16_224", "quadtree_b0"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.heavy if name in LARGE else ()) for name in EXPECTED]
)
def test_default_layer_by_family(name, open_fixture):
    model = filled(name, open_fixture)
    size = model.pretrained_cfg["input_size"] if model.pretrained_cfg.get("fixed_input_size") else (3, 128, 128)
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    assert cam.cam_layer(model, x) == EXPECTED[name]
    assert cam.grad_cam(model, x, raw=True).std() > 0


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("nat_atto", (133, 101), {}),
        ("swin_tiny_patch4_window7_224", (96, 160), {"img_size": (96, 160), "depths": (1, 1, 1, 1)}),
        ("deit_tiny_patch16_224", (96, 160), {"img_size": (96, 160), "depth": 2}),
    ],
)
def test_images_of_any_shape(name, size, options, open_fixture):
    model = filled(name, open_fixture, **options)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    target = model(x).argmax(1)
    found = cam.layer_cam(model, x)
    assert found.shape == (2, *size)
    torch.testing.assert_close(found.flatten(1).amax(1), torch.ones(2), atol=1e-4, rtol=0)
    # Each image is explained by itself, by its own class.
    torch.testing.assert_close(found[1:], cam.layer_cam(model, x[1:], target[1:]), atol=1e-4, rtol=0)


class Marked(nn.Module):
    """A classifier whose class 1 is the brightness of the first channel."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 3, 4, 4)
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.features.weight.zero_()
            self.features.bias.zero_()
            self.features.weight[range(3), range(3)] = 1 / 16
            self.head.weight.copy_(torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
        for parameter in self.parameters():
            parameter.requires_grad = False

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def test_map_lies_where_the_class_is_seen_and_frozen_weights_are_no_hindrance():
    x = torch.zeros(1, 3, 32, 32)
    x[0, 0, 4:12, 20:28] = 1
    model = Marked()
    with torch.inference_mode():
        found = cam.grad_cam(model, x, 1)[0]
    assert divmod(found.argmax().item(), 32) in [(y, x) for y in range(4, 12) for x in range(20, 28)]
    assert found[16:, :16].max() < 1e-6
    raw = cam.grad_cam(Marked(), x, 1, raw=True)
    torch.testing.assert_close(raw.sum(), Marked()(x)[0, 1])  # the classifier's own sum


def test_no_evidence_is_said():
    x = torch.zeros(2, 3, 32, 32)
    x[1, 0, :4] = 1
    with pytest.warns(UserWarning, match=r"features holds no positive evidence for the class in image \[0\]"):
        found = cam.grad_cam(Marked(), x, 1)
    assert not found[0].any()
    assert found[1].any()


def test_compiled_models_are_run_eagerly():
    x = torch.rand(1, 3, 32, 32)
    expected = cam.grad_cam(Marked(), x, 1)
    compiled = torch.compile(Marked(), backend="eager")
    compiled(x)
    assert torch.equal(cam.grad_cam(compiled, x, 1), expected)


def test_what_cannot_be_explained_is_refused(open_fixture):
    x = torch.randn(1, 3, 224, 224)
    vit = filled("vit_tiny_patch16_224", open_fixture)
    with pytest.raises(TaskError, match=r"vit_tiny.*no patch has a gradient at norm, .*use blocks\.11\.norm1"):
        cam.grad_cam(vit, x, layer="norm")
    with pytest.raises(TaskError, match=r"has no module 'blocks.12.norm1'; did you mean 'blocks"):
        cam.grad_cam(vit, x, layer="blocks.12.norm1")
    with pytest.raises(TaskError, match="head gives 1x1000, which is no map"):
        cam.grad_cam(vit, x, layer="head")
    with pytest.raises(TaskError, match="target is 1000, but vit_tiny_patch16_224 has classes 0 to 999"):
        cam.grad_cam(vit, x, 1000)
    with pytest.raises(TaskError, match="one for each of the 1 images"):
        cam.grad_cam(vit, x, [1, 2])
    with pytest.raises(TaskError, match=r"resmlp_12_224: .*untrained classifier's weights are 0"):
        cam.grad_cam(timm.create_model("resmlp_12_224"), x)
    with pytest.raises(TaskError, match=r"gives list, not logits"):
        cam.grad_cam(timm.create_model("nat_atto", features_only=True), x)
    with pytest.raises(TaskError, match="only a classifier has a class"):
        cam.grad_cam(timm.create_model("nat_atto", num_classes=0, global_pool=""), x)
