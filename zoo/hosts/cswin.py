"""CSWin transformer as a host.

Paper: CSWin Transformer, Dong et al., CVPR 2022, arXiv 2107.00652. Origin: github.com/microsoft/CSWin-Transformer, MIT.
"""

from collections.abc import Sequence
from typing import Final

from timm.layers import ClassifierHead, calculate_drop_path_rates
from torch import nn

from ...blocks.cross_shaped import CrossShapedAttention2d
from ...blocks.pyramid import Block, ConvEmbed
from .._pyramid import Pyramid, Stage
from . import ChooseAttention
from .swin import map_size_of


class CSWin(Pyramid):
    """CSWin transformer whose blocks attend as they are told, or else within cross-shaped windows.

    Args:
        attention: What attends; see `hosts`.
        img_size: Height and width of the images that other attentions' tables are learned for.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        stripes: Width of the stripes per stage; None for one window, the whole map.
        mlp_ratio: Hidden channels of the MLP over its input's.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.
    """

    symbolic_size: Final[bool] = False

    def __init__(
        self,
        attention: ChooseAttention,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripes: Sequence[int | None] = (1, 2, 7, None),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
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

        def attend(i: int, j: int) -> nn.Module:
            map_size = map_size_of(img_size, 4 * 2**i)
            return attention(i, j, channels[i], num_heads[i], map_size) or CrossShapedAttention2d(
                channels[i], num_heads[i], stripes[i], qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd
            )

        stages = []
        for i, dim in enumerate(channels):
            blocks = [
                Block(dim, attend(i, j), mlp_ratio, None, proj_drop_rate, drop_path, norm_layer, **dd)
                for j, drop_path in enumerate(drop_paths[i])
            ]
            shrink = nn.Identity() if i == 0 else ConvEmbed(dim // 2, dim, 3, 2, 1, **dd)
            stages.append(Stage(shrink, blocks))
        super().__init__(
            ConvEmbed(in_chans, embed_dim, 7, 4, 2, image=True, **dd),
            stages,
            channels=channels,
            norm=norm_layer(channels[-1], **dd),
            head=ClassifierHead(channels[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()
