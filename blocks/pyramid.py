"""Parts of hierarchical backbones that several families share; maps are NHWC between them."""

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from .pointwise import PointwiseMlp


class ConvStem(nn.Module):
    """Two overlapping 3x3 convolutions of stride 2 without a nonlinearity between, then a norm: NCHW to NHWC."""

    def __init__(self, in_chans: int, dim: int, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to ``[B, ceil(H / 4), ceil(W / 4), dim]``."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """Overlapping 3x3 convolution of stride 2 that doubles the channels, then a norm; NHWC."""

    def __init__(self, dim: int, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = norm_layer(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` to ``[B, ceil(H / 2), ceil(W / 2), 2C]``."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Transformer block: attention and MLP, each after a norm, scaled by an optional vector, dropped by path; NHWC."""

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        layer_scale: float | None,
        drop: float,
        drop_path: float,
        norm_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attention
        self.ls1 = LayerScale(dim, layer_scale, **dd) if layer_scale is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = PointwiseMlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.ls2 = LayerScale(dim, layer_scale, **dd) if layer_scale is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to the same shape."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
