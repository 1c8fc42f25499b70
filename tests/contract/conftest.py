"""The smallest relatives of every family, with every kind of block in them, for tests that run over all."""

from collections.abc import Callable

import foveate  # noqa: F401 (registers the models)
import pytest
import timm
import torch
from torch import Tensor, nn

_DAT = dict(embed_dim=16, num_heads=(1, 2, 2, 4), groups=(1, 1, 2, 4))
# OpenVINO 2026.4 confuses heads and tokens where there are as many of one as of the other.
_SWIN = dict(embed_dim=8, num_heads=(1, 2, 2, 8), depths=(1, 1, 1, 1))

# Options of the model of each name.
FAMILIES = {
    "nat_atto": dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), kernel_size=3),
    "dinat_mini": dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), dilations=[[2], [2], [1], [1]]),
    "dinat_s_tiny": dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), dilations=[[2], [2], [1], [1]]),
    "nat_isotropic_small": dict(embed_dim=16, depth=4, num_heads=2, img_size=64),
    "dinat_isotropic_small": dict(embed_dim=16, depth=4, num_heads=2, img_size=64, dilations=(1, 2, 1, 2)),
    "vitrpb_small": dict(embed_dim=16, depth=4, num_heads=2, img_size=64),
    "biformer_tiny": dict(embed_dim=32, depths=(1, 1, 1, 1)),
    "biformer_stl": dict(embed_dim=32, depths=(1, 1, 1, 1)),
    "biformer_stl_nchw": dict(embed_dim=32, depths=(1, 1, 1, 1)),
    "quadtree_b0": dict(embed_dims=(8, 16, 20, 32), depths=(1, 1, 1, 1)),
    "quadtree_a_b0": dict(embed_dims=(8, 16, 20, 32), depths=(1, 1, 1, 1)),
    "dat_tiny": dict(stages=("LS", "S", "LD", "D"), img_size=64, **_DAT),
    "dat_pp_tiny": dict(stages=("ND", "D", "ND", "D"), img_size=64, **_DAT),
    "dat_p_tiny": dict(stages=("ND", "D", "ND", "D"), img_size=64, **_DAT),
    "agent_deit_tiny": dict(embed_dim=16, num_heads=2, depth=4, agent_blocks=2, img_size=64),
    "agent_pvt_tiny": dict(embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(1, 1, 1, 1), img_size=64),
    "agent_swin_tiny": dict(agent_blocks=(1, 1, 0, 0), window_size=2, img_size=64, **_SWIN),
    "agent_cswin_tiny": dict(embed_dim=16, num_heads=(2, 4, 8, 16), depths=(1, 1, 2, 1), img_size=64),
    "inline_deit_tiny": dict(embed_dim=16, num_heads=2, depth=4, img_size=64),
    "inline_pvt_tiny": dict(embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(1, 1, 1, 1), img_size=64),
    "inline_swin_tiny": dict(inline_blocks=(1, 1, 0, 0), window_size=2, img_size=64, **_SWIN),
    "inline_cswin_tiny": dict(embed_dim=16, num_heads=(2, 4, 8, 16), depths=(1, 1, 2, 1), img_size=64),
    "litv2_small": dict(embed_dim=16, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1), alpha=0.5),
    "ela_t_resnet18": {},
    "ela_t_resnet50": dict(layers=(1, 1, 1, 1)),
    "ela_s_mobilenetv2": {},
    "shiftvit_light_tiny": dict(embed_dim=24, depths=(1, 1, 1, 1)),
    "overlock_xt": dict(
        embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), focus_depths=(2, 1), groups=(2, 2), head_dim=16
    ),
    "transnext_micro": dict(embed_dim=24, head_dim=12, depths=(1, 1, 1, 1), img_size=64),
    "transnext_micro_AAAA": dict(embed_dim=24, head_dim=12, depths=(1, 1, 1, 1), img_size=64),
    "moh_transnext_base_50": dict(
        embed_dim=24,
        head_dim=6,
        depths=(1, 1, 1, 1),
        img_size=64,
        shared_heads=(4, 2, 1, 0),
        routed_heads=(0, 4, 8, 16),
    ),
    "van_b0": dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    "mscan_t": dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    "foveate_davit_tiny": dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)),
    "foveate_host_atto": {},
}


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.0, **FAMILIES[name])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            # Of std 0.02 in so few channels, the context mixing's gradients are below those that are rounding alone.
            elif isinstance(module, nn.Conv2d) and name.startswith("overlock"):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


# One of each file of the zoo, and of each host: what `.ci/wide versions` takes.
_SHORT = (
    *(
        "nat_atto",
        "biformer_tiny",
        "quadtree_b0",
        "dat_tiny",
        "dat_pp_tiny",
        "agent_swin_tiny",
        "agent_deit_tiny",
        "inline_pvt_tiny",
    ),
    *("litv2_small", "ela_s_mobilenetv2", "shiftvit_light_tiny", "overlock_xt", "transnext_micro"),
    *("moh_transnext_base_50", "van_b0", "mscan_t", "foveate_davit_tiny", "foveate_host_atto"),
)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.versions if name in _SHORT else ()) for name in FAMILIES])
def family(request) -> str:
    """Return the name of a model of every family in turn."""
    return request.param


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.versions if name in _SHORT else pytest.mark.heavy) for name in FAMILIES
    ]
)
def exported(request) -> nn.Module:
    """Return what `model` does, by default of one model of each file of the zoo: writing a file takes long."""
    return _build(request.param)


@pytest.fixture
def build() -> Callable[[str], nn.Module]:
    """Return a function from a name to its smallest relative, for images of 64x64, whose logits are not all alike."""
    return _build


@pytest.fixture
def model(family) -> nn.Module:
    """Return the smallest relative of a model of every family in turn."""
    return _build(family)


@pytest.fixture
def images() -> Tensor:
    """Return two images of noise, 64x64."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
