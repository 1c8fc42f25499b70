"""Swin transformer as a host.

Paper: Swin Transformer, Liu et al., ICCV 2021, arXiv 2103.14030. Origin: github.com/microsoft/Swin-Transformer, MIT.
"""

from collections.abc import Sequence
from typing import Final

from timm.layers import ClassifierHead, PatchEmbed, calculate_drop_path_rates, to_2tuple
from timm.models.swin_transformer import PatchMerging
from torch import nn

from ...blocks.pyramid import Block
from ...blocks.window import WindowAttention2d
from .._pyramid import Pyramid, Stage
from . import ChooseAttention


class Swin(Pyramid):
    """Swin transformer whose blocks attend as they are told, or else within shifted windows.

    Args:
        attention: What attends; see `hosts`.
        img_size: Height and width of the images that other attentions' tables are learned for.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        window_size: Height and width of the windows; every other block shifts them by half.
        mlp_ratio: Hidden channels of the MLP over its input's.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        out_norms: Whether this is the dense model: each stage's output gets a norm, and windows shift on small maps,
            too. In the classifier they don't on a map whose shorter side is one window, and a map that is made of
            training images side by side (224x448 pixels are two) counts as one of them for ``map_size``.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size, padded as needed, to logits ``[B, num_classes]``.
    """

    symbolic_size: Final[bool] = False

    def __init__(
        self,
        attention: ChooseAttention,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        norm_layer = nn.LayerNorm
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        training_size = img_size if out_norms else _tile(img_size)

        def attend(i: int, j: int) -> nn.Module:
            map_size = map_size_of(training_size, 4 * 2**i)
            return attention(i, j, channels[i], num_heads[i], map_size) or WindowAttention2d(
                channels[i],
                num_heads[i],
                window_size,
                shift_size=window_size // 2 if j % 2 else 0,
                shift_where="all" if out_norms else "map",
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                **dd,
            )

        stages = []
        for i, dim in enumerate(channels):
            blocks = [
                Block(dim, attend(i, j), mlp_ratio, None, proj_drop_rate, drop_path, norm_layer, **dd)
                for j, drop_path in enumerate(drop_paths[i])
            ]
            shrink = nn.Identity() if i == 0 else PatchMerging(dim // 2, norm_layer=norm_layer, **dd)
            stages.append(Stage(shrink, blocks))
        super().__init__(
            PatchEmbed(
                None, 4, in_chans, embed_dim, norm_layer=norm_layer, output_fmt="NHWC", dynamic_img_pad=True, **dd
            ),
            stages,
            channels=channels,
            norm=norm_layer(channels[-1], **dd),
            out_norms=[norm_layer(dim, **dd) for dim in channels] if out_norms else None,
            head=ClassifierHead(channels[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()


def map_size_of(img_size: int | tuple[int, int], reduction: int) -> tuple[int, int]:
    """Return the height and width of the map of an image that is padded to a multiple of ``reduction``."""
    height, width = to_2tuple(img_size)
    return -(-height // reduction), -(-width // reduction)


def _tile(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the square that an image is made of side by side, else the image."""
    height, width = to_2tuple(img_size)
    side = min(height, width)
    return (height, width) if height % side or width % side else (side, side)
