"""Every family on a GPU gives what it gives on a CPU, in inference and for its gradients, and trains under autocast."""

import pytest
import timm
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# The smallest of every family, at a size it takes.
MODELS = {
    "nat_atto": 64,
    "dinat_mini": 224,
    "nat_isotropic_small": 112,
    "vitrpb_small": 224,
    "dinat_s_tiny": 224,
    "biformer_tiny": 224,
    "biformer_stl": 224,
    "dat_tiny": 224,
    "dat_pp_tiny": 224,
    "quadtree_b0": 224,
    "quadtree_a_b0": 224,
    "agent_deit_tiny": 224,
    "agent_pvt_tiny": 224,
    "agent_swin_tiny": 224,
    "agent_cswin_tiny": 224,
    "inline_deit_tiny": 224,
    "inline_pvt_tiny": 224,
    "inline_swin_tiny": 224,
    "inline_cswin_tiny": 224,
    "litv2_small": 224,
    "shiftvit_light_tiny": 224,
    "overlock_xt": 224,
    "van_b0": 224,
    "mscan_t": 224,
    "transnext_micro": 224,
    "ela_t_resnet18": 224,
    "foveate_davit_tiny": 224,
    "foveate_host_atto": 64,
}


@pytest.fixture(autouse=True)
def _exact_float32():
    """Convolutions on GPUs round to tf32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def build(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():  # logits that differ between images
        if isinstance(module, torch.nn.Linear):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / module.in_features**0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_gpus_agree_with_cpus(name):
    size = MODELS[name]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    model = build(name).eval()
    results = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.zero_grad()
        logits = model(images.to(device))
        logits.square().sum().backward()
        gradients = {key: p.grad.cpu().clone() for key, p in model.named_parameters()}
        results.append((logits.detach().cpu(), gradients))
    (expected, expected_gradients), (actual, actual_gradients) = results
    torch.testing.assert_close(actual, expected, atol=2e-3 * expected.abs().max().item(), rtol=0)
    for key, gradient in expected_gradients.items():
        error = (actual_gradients[key] - gradient).norm() / gradient.norm().clamp(min=1e-4)
        assert error < 0.02, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_a_step_under_autocast_is_finite(name):
    size = MODELS[name]
    model = build(name).cuda().train()
    images = torch.randn(2, 3, size, size, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1], device="cuda"))
    loss.backward()
    assert loss.isfinite()
    assert not [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    with torch.inference_mode():
        exact = model.eval()(images)
        half = model.bfloat16()(images.bfloat16())
    assert half.isfinite().all()
    assert (half.float() - exact).norm() < 0.5 * exact.norm()
