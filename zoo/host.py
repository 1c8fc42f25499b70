"""A neutral host: one network of four stages for every spatial attention here, to compare them on equal terms.

Ours, after NAT's layout (arXiv 2204.07143): overlapping convolutions as stem and between stages, pre-norm blocks. Only
the attention differs, named for all stages or for each, as in `blocks.create_attention`. Without published weights.
"""

from collections.abc import Mapping, Sequence

from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..blocks.create import create_attention
from ..blocks.pyramid import Block, ConvDownsample, ConvStem
from ._build import IMAGENET_CFG, build
from ._pyramid import Pyramid, Stage

__all__ = ["Host"]


class Host(Pyramid):
    """Four stages of blocks with a chosen attention on maps of 1/4 to 1/32 of the image.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        attention: Name of the attention, as in `blocks.create_attention`, or a name for each stage.
        attention_options: Options of the attention, or of each stage's; none by default.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratio: Hidden channels of the MLP over its input's.
        layer_scale: Initial scale of each residual branch; none by default.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after the MLP's projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.

    Raises:
        ValueError: If there is no such attention, or not one, or not options, for each stage.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        attention: str | Sequence[str] = "neighborhood",
        attention_options: Mapping | Sequence[Mapping] | None = None,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        names = [attention] * len(depths) if isinstance(attention, str) else list(attention)
        attention_options = attention_options or {}
        shared = isinstance(attention_options, Mapping)
        options = [attention_options] * len(depths) if shared else list(attention_options)
        if len(names) != len(depths) or len(options) != len(depths):
            raise ValueError(
                f"attention and attention_options must be one for all, or one for each of {len(depths)} stages; "
                f"got {len(names)} names and {len(options)} options"
            )
        norm_layer = nn.LayerNorm
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(channels):
            blocks = [
                Block(
                    dim,
                    create_attention(names[i], dim, num_heads[i], **options[i], **dd),
                    mlp_ratio,
                    layer_scale,
                    proj_drop_rate,
                    drop_path,
                    norm_layer,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            downsample = nn.Identity() if i == 0 else ConvDownsample(dim // 2, norm_layer, **dd)
            stages.append(Stage(downsample, blocks))
        super().__init__(
            ConvStem(in_chans, embed_dim, norm_layer, **dd),
            stages,
            channels=channels,
            norm=norm_layer(channels[-1], **dd),
            head=ClassifierHead(channels[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()


def keep_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict as it is: the only files are our own."""
    return dict(state)


_ATTO = dict(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 8))
_TINY = dict(embed_dim=64, depths=(2, 2, 6, 2), num_heads=(2, 4, 8, 16), drop_path_rate=0.1)


def _cfg(**options) -> dict:
    return IMAGENET_CFG | {
        "first_conv": "stem.proj.0",
        "license": "mit",
        **options,
    }


default_cfgs = generate_default_cfgs(
    {"foveate_host_atto.untrained": _cfg(), "foveate_host_tiny.untrained": _cfg()},
)


@register_model
def foveate_host_atto(pretrained: bool = False, **kwargs) -> Host:
    """Host for demos and tests: 5 blocks on 32 to 256 channels; ``attention="window"`` and so on chooses."""
    return build(Host, "foveate_host_atto", pretrained, keep_names, **{**_ATTO, **kwargs})


@register_model
def foveate_host_tiny(pretrained: bool = False, **kwargs) -> Host:
    """Host for comparisons: 12 blocks on 64 to 512 channels; ``attention="window"`` and so on chooses."""
    return build(Host, "foveate_host_tiny", pretrained, keep_names, **{**_TINY, **kwargs})
