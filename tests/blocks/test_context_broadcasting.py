"""Context Broadcasting: the mean of all positions, at the end of every MLP."""

import copy

import foveate  # noqa: F401 (registers the models)
import pytest
import timm
import torch
from foveate import create_backbone
from foveate.blocks import broadcast_context


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "nat_atto", "van_b0", "agent_deit_tiny", "shiftvit_light_tiny"]
)
def test_each_mlp_ends_with_the_mean_of_all_positions(name):
    torch.manual_seed(0)
    if name.startswith("vit"):
        plain, model = (timm.create_model(name, depth=1, num_classes=5) for _ in range(2))
        broadcast_context(model)
    else:
        plain = timm.create_model(name, num_classes=5)
        model = timm.create_model(name, num_classes=5, context_broadcasting=True)
    model.load_state_dict(plain.state_dict())
    seen = {}
    mlps = {key: part for key, part in model.named_modules() if key.rpartition(".")[2] == "mlp"}
    assert mlps
    for key, part in mlps.items():
        part.register_forward_hook(lambda module, args, out, key=key: seen.__setitem__(key, (args[0], out)))
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-6)
        for key, (inner, out) in seen.items():
            part = plain.get_submodule(key)
            y = part(inner)
            axes = (2, 3) if isinstance(part.fc1, torch.nn.Conv2d) else tuple(range(1, y.ndim - 1))
            assert torch.allclose(out, (y + y.mean(axes, keepdim=True)) / 2, atol=1e-6)


def test_it_is_an_option_of_backbones_and_survives_copies_and_graphs():
    x = torch.rand(1, 3, 64, 64)
    model = timm.create_model("nat_atto", context_broadcasting=True).eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        graph = torch.export.export(model, (x,)).module()
        assert torch.allclose(graph(x), expected, atol=1e-5)
        features = timm.create_model("nat_atto", features_only=True, context_broadcasting=True).eval()
        features.model.load_state_dict(model.state_dict(), strict=False)
        assert torch.allclose(features(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1], atol=1e-6)
    assert any(part._forward_hooks for part in create_backbone("nat_atto", context_broadcasting=True).modules())


def test_a_model_without_mlps_says_so():
    with pytest.raises(ValueError, match="context_broadcasting: ResNet has no MLPs"):
        broadcast_context(timm.create_model("resnet18"))
