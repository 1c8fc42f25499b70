"""Pyramid vision transformer (PVT v1) as a host.

Paper: Pyramid Vision Transformer, Wang et al., ICCV 2021, arXiv 2102.12122. Origin: github.com/whai362/PVT, Apache-2.0.
"""

from collections.abc import Sequence
from functools import partial

from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple
from torch import nn

from ...blocks.pyramid import Block, ConvEmbed
from .._pyramid import Pyramid, Stage
from . import ChooseAttention


class PVT(Pyramid):
    """Stages of patches of 2x2, each with a position embedding, after patches of 4x4.

    There is no final norm: the classifier reads the mean of the last map. The host has no attention of its own.

    Args:
        attention: What attends; see `hosts`.
        img_size: Height and width of the images that the position embeddings are learned for; images of any other size
            from 32 pixels on may be given.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratios: Hidden channels of the MLP over its input's, per stage.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after the MLP's projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``. Each stage cuts off what its patches don't cover.
    """

    def __init__(
        self,
        attention: ChooseAttention,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        height, width = to_2tuple(img_size)
        stem, stages = None, []
        for i, dim in enumerate(embed_dims):
            map_size = (height // (4 * 2**i), width // (4 * 2**i))
            if i == 0:
                stem, downsample = ConvEmbed(in_chans, dim, 4, 4, map_size=map_size, image=True, **dd), nn.Identity()
            else:
                downsample = ConvEmbed(embed_dims[i - 1], dim, 2, 2, map_size=map_size, **dd)
            blocks = [
                Block(
                    dim,
                    attention(i, j, dim, num_heads[i], map_size),
                    mlp_ratios[i],
                    None,
                    proj_drop_rate,
                    drop_path,
                    norm_layer,
                    **dd,
                )
                for j, drop_path in enumerate(drop_paths[i])
            ]
            stages.append(Stage(downsample, blocks))
        super().__init__(
            stem,
            stages,
            channels=embed_dims,
            norm=nn.Identity(),
            head=ClassifierHead(embed_dims[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()
