"""ResNet-18, ResNet-50 and MobileNetV2 with Efficient Local Attention in their blocks.

Paper: ELA: Efficient Local Attention for Deep Convolutional Neural Networks, arXiv 2403.01123.

Origin: github.com/Xuwei86/ELA_Code, which states no license; nothing of it is used. The networks are timm's, with
`blocks.EfficientLocalAttention` where the authors put it:

    * ResNet-18: on the output of each residual branch, with a skip.
    * ResNet-50: in each branch before the last convolution, with a skip.
    * MobileNetV2: after the depthwise convolution of each block that expands, without.

No weights of these networks were published. ``pretrained=True`` loads timm's weights of the host network, and says that
the attention starts fresh: such a model has to be trained before use. The authors' MobileNetV2 files load too.
"""

import logging
import re
from functools import partial

from timm.layers import create_attn
from timm.models import register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..blocks.ela import EfficientLocalAttention
from ._build import IMAGENET_CFG, build, cfgs_with_links

__all__ = ["InnerAttentionBottleneck"]

_logger = logging.getLogger(__name__)


class InnerAttentionBottleneck(Bottleneck):
    """timm's bottleneck with the attention layer before the last convolution, on its fewer channels.

    Args:
        *args: As timm's.
        attn_layer: Attention layer, called with the number of channels.
        **kwargs: As timm's.
    """

    def __init__(self, *args, attn_layer=None, device=None, dtype=None, **kwargs):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.se = create_attn(attn_layer, self.conv3.in_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the block's output."""
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        if self.se is not None:
            x = self.se(x)
        x = self.bn3(self.conv3(x))
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return self.act3(x + shortcut)


def _mobile_attention(
    channels: int, variant: str, skip: bool, act_layer: type[nn.Module] | None = None, device=None, dtype=None
) -> EfficientLocalAttention:
    """Build the attention as timm's mobile blocks ask for it; they offer an activation, of which ELA has none."""
    return EfficientLocalAttention(channels, variant, skip, device=device, dtype=dtype)


# MobileNetV2's stages in timm's notation; `se` puts an attention into the blocks, its ratio has no meaning here.
_MOBILENETV2 = (
    "ds_r1_k3_s1_c16",
    "ir_r2_k3_s2_e6_c24_se0.25",
    "ir_r3_k3_s2_e6_c32_se0.25",
    "ir_r4_k3_s2_e6_c64_se0.25",
    "ir_r3_k3_s1_e6_c96_se0.25",
    "ir_r3_k3_s2_e6_c160_se0.25",
    "ir_r1_k3_s1_e6_c320_se0.25",
)
_REPEATS = (1, 2, 3, 4, 3, 3, 1)
# The authors number a block's layers; timm names them.
_PLAIN_LAYERS = {0: "conv_dw", 1: "bn1", 3: "conv_pw", 4: "bn2"}
_EXPANDING_LAYERS = {0: "conv_pw", 1: "bn1", 3: "conv_dw", 4: "bn2", 6: "se", 7: "conv_pwl", 8: "bn3"}


def _from_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' MobileNetV2 to timm's names; what has no counterpart keeps its name."""
    places = [f"blocks.{stage}.{i}" for stage, repeat in enumerate(_REPEATS) for i in range(repeat)]
    heads = {"features.0.0": "conv_stem", "features.0.1": "bn1", "conv.0": "conv_head", "conv.1": "bn2"}
    heads["classifier.1"] = "classifier"
    renamed = {}
    for key, value in state.items():
        if match := re.fullmatch(r"features\.(\d+)\.conv\.(\d+)\.(.+)", key):
            block, layer = int(match[1]), int(match[2])
            names = _PLAIN_LAYERS if block == 1 else _EXPANDING_LAYERS
            if 1 <= block <= len(places) and layer in names:
                key = f"{places[block - 1]}.{names[layer]}.{match[3]}"
        else:
            stem, _, leaf = key.rpartition(".")
            key = f"{heads[stem]}.{leaf}" if stem in heads else key
        renamed[key] = value
    return renamed


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor | None]:
    """Rename a published state dict to ``model``'s names.

    Reads the authors' MobileNetV2 and timm's files of the host networks; with the latter the model's attention
    starts fresh, with a warning.
    """
    state = _from_authors(state) if any(key.startswith("features.") for key in state) else dict(state)
    return with_fresh_attention(state, model)


def with_fresh_attention(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor | None]:
    """Leave out ``model``'s attention, with a warning, where the entries are those of its host network alone."""
    attention = [key for key in model.state_dict() if ".se." in key]
    if not any(key in state for key in attention):
        _logger.warning(
            "the checkpoint holds the host network's weights only; the attention (%d tensors) starts fresh, train it",
            len(attention),
        )
        return {**state, **dict.fromkeys(attention)}
    return dict(state)


def _host(cls: type[nn.Module], name: str, pretrained: bool, options: dict, config: dict) -> nn.Module:
    if options.get("features_only"):
        # timm counts the stem's map as the first of these networks.
        config = {"out_indices": (0, 1, 2, 3, 4), **config}
    return build(cls, name, pretrained, convert_checkpoint, **{**config, **options})


def _resnet(name: str, pretrained: bool, options: dict, variant: str, **config) -> ResNet:
    attention = partial(EfficientLocalAttention, variant=variant, skip=options.pop("ela_skip", True))
    return _host(ResNet, name, pretrained, options, {"block_args": {"attn_layer": attention}, **config})


def _resnet18(name: str, pretrained: bool, options: dict, variant: str) -> ResNet:
    return _resnet(name, pretrained, options, variant, block=BasicBlock, layers=(2, 2, 2, 2))


def _resnet50(name: str, pretrained: bool, options: dict, variant: str) -> ResNet:
    return _resnet(name, pretrained, options, variant, block=InnerAttentionBottleneck, layers=(3, 4, 6, 3))


def _mobilenetv2(name: str, pretrained: bool, options: dict, variant: str) -> EfficientNet:
    config = {
        "block_args": decode_arch_def([[stage] for stage in _MOBILENETV2]),
        "num_features": 1280,
        "stem_size": 32,
        "round_chs_fn": round_channels,
        "act_layer": nn.ReLU6,
        "se_layer": partial(_mobile_attention, variant=variant, skip=options.pop("ela_skip", False)),
    }
    return _host(EfficientNet, name, pretrained, options, config)


# Dense settings of our own, for `create_backbone(name, setting=...)`: the authors have one of DeepLabV3 alone.
dense_settings: dict[str, dict[str, dict]] = {
    f"ela_{variant}_{host}": {"detection": {}, "segmentation": {}, "deeplabv3": {"output_stride": 16}}
    for host, variants in (("resnet18", "tbsl"), ("resnet50", "tbsl"), ("mobilenetv2", "bsl"))
    for variant in variants
}


def _cfg(**options) -> dict:
    return IMAGENET_CFG | {
        "crop_pct": 0.95,
        "license": "apache-2.0",
        "origin_url": "https://github.com/huggingface/pytorch-image-models",
        "paper_ids": "arXiv:2403.01123",
        **options,
    }


_RESNET = dict(first_conv="conv1", classifier="fc")
_MOBILE = dict(first_conv="conv_stem", classifier="classifier", crop_pct=0.875)

default_cfgs = cfgs_with_links(
    {
        **{f"ela_{v}_resnet18.host_a1_in1k": _cfg(**_RESNET) for v in "tbsl"},
        **{f"ela_{v}_resnet50.host_a1_in1k": _cfg(**_RESNET) for v in "tbsl"},
        **{f"ela_{v}_mobilenetv2.host_ra_in1k": _cfg(**_MOBILE) for v in "bsl"},
    }
)


@register_model
def ela_t_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 with ELA-T, 11.70 M parameters; ``ela_skip`` (True) adds the input to the attention's output."""
    return _resnet18("ela_t_resnet18", pretrained, kwargs, "t")


@register_model
def ela_b_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 with ELA-B, 11.71 M parameters; ``ela_skip`` (True) adds the input to the attention's output."""
    return _resnet18("ela_b_resnet18", pretrained, kwargs, "b")


@register_model
def ela_s_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 with ELA-S, 11.77 M parameters; ``ela_skip`` (True) adds the input to the attention's output."""
    return _resnet18("ela_s_resnet18", pretrained, kwargs, "s")


@register_model
def ela_l_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 with ELA-L, 11.80 M parameters; ``ela_skip`` (True) adds the input to the attention's output."""
    return _resnet18("ela_l_resnet18", pretrained, kwargs, "l")


@register_model
def ela_t_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with ELA-T, 25.58 M parameters; ``ela_skip`` (True) adds the input to the attention's output."""
    return _resnet50("ela_t_resnet50", pretrained, kwargs, "t")


@register_model
def ela_b_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with ELA-B, 25.59 M parameters; ``ela_skip`` (True) adds the input to the attention's output."""
    return _resnet50("ela_b_resnet50", pretrained, kwargs, "b")


@register_model
def ela_s_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with ELA-S, 25.72 M parameters; ``ela_skip`` (True) adds the input to the attention's output."""
    return _resnet50("ela_s_resnet50", pretrained, kwargs, "s")


@register_model
def ela_l_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with ELA-L, 25.78 M parameters; ``ela_skip`` (True) adds the input to the attention's output."""
    return _resnet50("ela_l_resnet50", pretrained, kwargs, "l")


@register_model
def ela_b_mobilenetv2(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MobileNetV2 with ELA-B, 3.57 M parameters; ``ela_skip`` (False) adds the input to the attention's output."""
    return _mobilenetv2("ela_b_mobilenetv2", pretrained, kwargs, "b")


@register_model
def ela_s_mobilenetv2(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MobileNetV2 with ELA-S, 3.80 M parameters; ``ela_skip`` (False) adds the input to the attention's output."""
    return _mobilenetv2("ela_s_mobilenetv2", pretrained, kwargs, "s")


@register_model
def ela_l_mobilenetv2(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MobileNetV2 with ELA-L, 3.92 M parameters; ``ela_skip`` (False) adds the input to the attention's output."""
    return _mobilenetv2("ela_l_mobilenetv2", pretrained, kwargs, "l")
