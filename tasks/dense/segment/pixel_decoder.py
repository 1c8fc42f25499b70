"""Mask2Former's pixel decoder: deformable attention across the three coarser maps, then one step of a pyramid.

Written anew after section 3.1 of Deformable DETR (arXiv 2010.04159) and the settings of Mask2Former (arXiv 2112.01527,
github.com/facebookresearch/Mask2Former, MIT), whose parameter names it keeps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....blocks.multi_scale_deformable import pixel_centres
from ... import TaskError
from ..deformable_encoder import DeformableEncoderLayer, flatten_maps, sine_position
from .inference import resize_to

_GROUPS = 32


class _NormedConv(nn.Conv2d):
    """A convolution without bias, a group norm and perhaps ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, activate: bool):
        super().__init__(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.activate = activate
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(super().forward(x))
        return x.relu() if self.activate else x


class _Transformer(nn.Module):
    """The encoder layers and the embedding that tells the maps apart, under their published names."""

    def __init__(self, layers: Sequence[nn.Module], dim: int, num_levels: int):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(layers)
        self.level_embed = nn.Parameter(torch.randn(num_levels, dim))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        tokens, shapes = flatten_maps(maps)
        positions = [
            sine_position(*shape, maps[0].shape[1], maps[0]).flatten(2).transpose(1, 2) + embed
            for shape, embed in zip(shapes, self.level_embed, strict=True)
        ]
        position = torch.cat(positions, dim=1)
        reference = pixel_centres(shapes, tokens)
        for layer in self.encoder.layers:
            tokens = layer(tokens, position, reference, shapes)
        pieces = tokens.split([height * width for height, width in shapes], dim=1)
        return [piece.transpose(1, 2).unflatten(2, shape) for piece, shape in zip(pieces, shapes, strict=True)]


class PixelDecoder(nn.Module):
    """From a backbone's four maps to three of equal channels for the queries, and a fine one for the masks.

    Everything is computed in float32, under autocast too, as published; points of half precision would miss pixels.

    Args:
        in_channels: Channels of the backbone's four maps, from the finest to the coarsest.
        dim: Channels of the results; a multiple of 32.
        hidden: Channels inside the layers' MLPs.
        num_layers: Layers of deformable attention.
        num_heads: Heads of each.
        num_points: Points of each head on each map.
        dropout: Dropout rate in the layers; 0.1 in OneFormer.

    Raises:
        ValueError: If there are not four maps or ``dim`` is not a multiple of 32.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int = 256,
        hidden: int = 1024,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(in_channels) != 4 or dim % _GROUPS:
            raise ValueError(
                f"the pixel decoder takes four maps and a dim that is a multiple of {_GROUPS}; "
                f"got {len(in_channels)} maps, dim {dim}"
            )
        finest, *others = in_channels
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(_GROUPS, dim)) for channels in reversed(others)
        )
        for proj in self.input_proj:
            nn.init.xavier_uniform_(proj[0].weight)
            nn.init.zeros_(proj[0].bias)
        layers = (
            DeformableEncoderLayer(dim, hidden, num_heads, len(others), num_points, dropout) for _ in range(num_layers)
        )
        self.transformer = _Transformer(list(layers), dim, len(others))
        self.adapter_1 = _NormedConv(finest, dim, 1, activate=False)
        self.layer_1 = _NormedConv(dim, dim, 3, activate=True)
        self.mask_features = nn.Conv2d(dim, dim, 1)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Map the backbone's features to ``[B, dim, H_0, W_0]`` for the masks and three maps, coarsest first.

        Raises:
            TaskError: If the parameters aren't float32.
        """
        if self.mask_features.weight.dtype != torch.float32:
            raise TaskError(
                f"this head computes in float32, as published, but was brought to {self.mask_features.weight.dtype}; "
                "use torch.autocast, or bring it back: model.head.float()"
            )
        with torch.autocast(features[0].device.type, enabled=False):
            finest, *others = (x.float() for x in features)
            maps = self.transformer([proj(x) for proj, x in zip(self.input_proj, reversed(others), strict=True)])
            adapted = self.adapter_1(finest)
            fine = self.layer_1(adapted + resize_to(maps[-1], adapted.shape[-2:]))
            return self.mask_features(fine), maps
