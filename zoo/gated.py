"""ResNet-50 with a gate in each block: CBAM, triplet attention, polarized attention (two forms), DAS, ULSAM.

Papers: CBAM, arXiv 1807.06521; Rotate to Attend (triplet attention), arXiv 2010.03045; Polarized Self-Attention, arXiv
2107.00782; DAS, arXiv 2311.12091; ULSAM, arXiv 2006.15102.

Code after the papers: the network is timm's, the gates are in ``blocks/``, and no published file was opened. Places,
names and first values of CBAM's and triplet attention's were read in the authors' code, PSA's place in its HRNet.

    * CBAM, triplet attention: on the output of each residual branch, before the sum (the authors' ResNet-50).
    * Polarized attention: after the 3x3 convolution of each branch, on its fewer channels: the paper's "after the first
      3x3 convolution in every residual block", as the basic blocks of the authors' HRNet have it.
    * DAS there too, ULSAM where CBAM is. The places are ours: DAS has no public code, ULSAM's hosts are MobileNets.

Origins: github.com/Jongchan/attention-module (MIT) and github.com/landskape-ai/triplet-attention (MIT), whose names of
parameters are read. Files of other ResNet-50 of timm load too; then the attention starts fresh, with a warning.
"""

from collections.abc import Callable
from functools import partial

from timm.models import register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from ..blocks.cbam import CBAM
from ..blocks.cbam import read_authors_names as read_cbam_names
from ..blocks.das import DeformableGate
from ..blocks.polarized import PolarizedAttention
from ..blocks.subspace import SubspaceAttention
from ..blocks.triplet import TripletAttention
from ..blocks.triplet import read_authors_names as read_triplet_names
from ._build import IMAGENET_CFG, build, cfgs_with_links
from .ela import InnerAttentionBottleneck, with_fresh_attention

__all__: list[str] = []

# What the authors' blocks call their attention.
_AUTHORS = (".cbam.", ".triplet_attention.")


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor | None]:
    """Rename a published state dict to ``model``'s names.

    Reads the authors' ResNet-50 with CBAM and with triplet attention, and timm's files of the host network.
    """
    converted = {}
    for key, value in state.items():
        for name in _AUTHORS:
            key = key.replace(name, ".se.")
        converted[key] = value
    for name, module in model.named_modules():
        if isinstance(module, CBAM):
            read_cbam_names(converted, f"{name}.")
        elif isinstance(module, TripletAttention):
            read_triplet_names(converted, f"{name}.")
    return with_fresh_attention(converted, model)


def _cbam(channels: int, **kwargs) -> CBAM:
    """Return CBAM as the authors' network starts it: the norm of the spatial gate at zero."""
    attention = CBAM(channels, **kwargs)
    nn.init.zeros_(attention.spatial.conv.bn.weight)
    return attention


def _triplet(channels: int, **kwargs) -> TripletAttention:
    """Return triplet attention as the authors' network starts it, like `_cbam`."""
    attention = TripletAttention(channels, **kwargs)
    nn.init.zeros_(attention.hw.conv.bn.weight)
    return attention


def _resnet50(
    name: str, pretrained: bool, options: dict, attention: Callable[..., nn.Module], block: type[nn.Module] = Bottleneck
) -> ResNet:
    if options.get("features_only"):
        # timm counts the stem's map as the first of this network.
        options = {"out_indices": (0, 1, 2, 3, 4), **options}
    config = {"block": block, "layers": (3, 4, 6, 3), "block_args": {"attn_layer": attention}}
    return build(ResNet, name, pretrained, convert_checkpoint, **{**config, **options})


def _cfg(paper: str, origin: str, **options) -> dict:
    return IMAGENET_CFG | {
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "mit",
        "origin_url": origin,
        "paper_ids": f"arXiv:{paper}",
        **options,
    }


default_cfgs = cfgs_with_links(
    {
        "cbam_resnet50.jongchan_in1k": _cfg("1807.06521", "https://github.com/Jongchan/attention-module"),
        "triplet_resnet50.landskape_in1k": _cfg("2010.03045", "https://github.com/landskape-ai/triplet-attention"),
        "psa_p_resnet50.untrained": _cfg("2107.00782", "https://github.com/DeLightCMU/PSA"),
        "psa_s_resnet50.untrained": _cfg("2107.00782", "https://github.com/DeLightCMU/PSA"),
        "das_resnet50.untrained": _cfg("2311.12091", "https://arxiv.org/abs/2311.12091"),
        "ulsam_resnet50.untrained": _cfg("2006.15102", "https://github.com/Nandan91/ULSAM"),
    }
)


@register_model
def cbam_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with CBAM, 28.09 M parameters."""
    return _resnet50("cbam_resnet50", pretrained, kwargs, _cbam)


@register_model
def triplet_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with triplet attention of 7x7 convolutions, 25.56 M parameters."""
    return _resnet50("triplet_resnet50", pretrained, kwargs, _triplet)


@register_model
def psa_p_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with polarized attention, gates in parallel, 28.08 M parameters; no weights."""
    return _resnet50("psa_p_resnet50", pretrained, kwargs, PolarizedAttention, InnerAttentionBottleneck)


@register_model
def psa_s_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with polarized attention, gates in sequence, 27.69 M parameters; no weights."""
    attention = partial(PolarizedAttention, layout="sequential")
    return _resnet50("psa_s_resnet50", pretrained, kwargs, attention, InnerAttentionBottleneck)


@register_model
def das_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with gates of deformable convolutions (DAS), 28.23 M parameters; no weights."""
    return _resnet50("das_resnet50", pretrained, kwargs, DeformableGate, InnerAttentionBottleneck)


@register_model
def ulsam_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with subspace attention (ULSAM) of four groups, 25.63 M parameters; no weights."""
    return _resnet50("ulsam_resnet50", pretrained, kwargs, SubspaceAttention)
