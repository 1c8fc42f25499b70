"""Parts of hierarchical backbones that several families share; maps are NHWC, unless a part says NCHW."""

import torch
from timm.layers import DropPath, LayerScale, register_notrace_function, trunc_normal_
from torch import Tensor, nn

from .layout import channels_last
from .pointwise import PointwiseMlp
from .position import resize_map


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


class BatchNormStem(nn.Module):
    """Two overlapping 3x3 convolutions of stride 2, each with a batch norm, GELU between them; NCHW."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to ``[B, dim, ceil(H / 4), ceil(W / 4)]``, channels last in memory."""
        x = self.act(self.norm1(self.conv1(channels_last(x))))
        return self.norm2(self.conv2(x))


class BatchNormDownsample(nn.Module):
    """Overlapping 3x3 convolution, of stride 2 by default, then a batch norm; NCHW."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=stride, padding=1, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to ``[B, out_dim, ceil(H / stride), ceil(W / stride)]``."""
        return self.norm(self.conv(x))


@register_notrace_function
def check_holds_patch(height: int, width: int, kernel_size: int) -> None:
    """Raise a ValueError if a map is smaller than one patch."""
    if height < kernel_size or width < kernel_size:
        raise ValueError(
            f"the image is too small: a map of {height}x{width} holds no patch of {kernel_size}x{kernel_size}; "
            "images of at least 32x32 pixels are large enough"
        )


class ConvEmbed(nn.Module):
    """Strided convolution, norm, and optionally a position embedding: to NHWC.

    Args:
        in_chans: Channels before.
        dim: Channels after.
        kernel_size: Height and width of the kernel.
        stride: Stride; without padding, what it leaves over at the bottom and right is cut off.
        padding: Padding.
        map_size: Height and width of the maps that the position embedding is learned for; None for no embedding.
        image: Whether the input is NCHW, not NHWC.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        map_size: tuple[int, int] | None = None,
        image: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.image = image
        # What a map must have at least.
        self.least = kernel_size - 2 * padding
        self.conv = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, *map_size, dim, **dd)) if map_size is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the position embedding as published: truncated normal, std 0.02."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chans, H, W]``, or ``[B, H, W, in_chans]``, to ``[B, H', W', dim]``."""
        if not self.image:
            x = x.permute(0, 3, 1, 2)
        check_holds_patch(x.shape[2], x.shape[3], self.least)
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))
        if self.pos_embed is not None:
            x = x + resize_map(self.pos_embed, x.shape[1], x.shape[2], "bilinear")
        return x


class Block(nn.Module):
    """Transformer block: attention and MLP, each after a norm, scaled by an optional vector, dropped by path; NHWC.

    An attention that says ``takes_input`` gets the block's input, before the norm, as its second argument.
    """

    shows_input: torch.jit.Final[bool]

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
        self.shows_input = getattr(attention, "takes_input", False)
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
        out = self.attn(self.norm1(x), x) if self.shows_input else self.attn(self.norm1(x))
        x = x + self.drop_path1(self.ls1(out))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
