"""Efficient Local Attention (ELA, arXiv 2403.01123): gates from the means of rows and columns."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .record import Recorded, tell_gate


class _Variant(NamedTuple):
    kernel_size: int
    group_width: int
    norm_groups: int


# Kernel, channels of a convolution's group, groups of the norm; in the authors' order, B is lighter than S.
_VARIANTS = {"t": _Variant(5, 1, 32), "b": _Variant(7, 1, 16), "s": _Variant(5, 8, 16), "l": _Variant(7, 8, 16)}


class EfficientLocalAttention(nn.Module):
    """Scale a map by a gate for every row and one for every column, per channel.

    The means over the width, ``[B, channels, H]``, and over the height, ``[B, channels, W]``, go through the same 1D
    convolution, the same group norm and a sigmoid; the output is the input times both gates. This is the published
    block. timm's ``"ela"`` is another: separate depthwise convolutions, norms of one group, a SiLU.

    The class is an attention layer of timm: ``timm.create_model("resnet18",
    block_args=dict(attn_layer=functools.partial(EfficientLocalAttention, variant="s")))``.

    Args:
        channels: Channels; a multiple of 32 for ``"t"``, of 16 for the others.
        variant: ``"t"`` or ``"b"``, depthwise with kernel 5 or 7, for small networks; ``"s"`` or ``"l"``, in groups of
            8 channels with kernel 5 or 7, for larger ones.
        skip: Whether to add the input to the output, as the authors do in residual networks: a fresh block alone
            scales its input by about a quarter.

    Shape:
        ``[B, channels, H, W]`` to ``[B, channels, H, W]``, any H and W.

    Raises:
        ValueError: If the variant is unknown or cannot take that many channels.

    Example:
        >>> attention = EfficientLocalAttention(64, variant="s")
        >>> attention(torch.randn(2, 64, 14, 20)).shape
        torch.Size([2, 64, 14, 20])
    """

    def __init__(self, channels: int, variant: str = "b", skip: bool = False, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if variant not in _VARIANTS:
            raise ValueError(f"ELA has the variants {', '.join(map(repr, _VARIANTS))}; got {variant!r}")
        kernel_size, group_width, norm_groups = _VARIANTS[variant]
        if channels % norm_groups:
            fitting = [name for name, other in _VARIANTS.items() if channels % other.norm_groups == 0]
            way_out = (
                f"variants {', '.join(map(repr, fitting))} take it" if fitting else "change the number of channels"
            )
            raise ValueError(
                f"ELA variant {variant!r} needs a multiple of {norm_groups} channels; got {channels}: {way_out}"
            )
        self.skip = skip
        self.conv = nn.Conv1d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels // group_width, bias=False, **dd
        )
        self.gn = nn.GroupNorm(norm_groups, channels, **dd)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"skip={self.skip}"

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gates of the rows ``[B, channels, H]`` and of the columns ``[B, channels, W]`` of ``x``."""
        rows = torch.sigmoid(self.gn(self.conv(x.mean(3))))
        columns = torch.sigmoid(self.gn(self.conv(x.mean(2))))
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x`` ``[B, channels, H, W]``."""
        rows, columns = self.gates(x)
        out = x * rows.unsqueeze(3) * columns.unsqueeze(2)
        return x + out if self.skip else out

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        rows, columns = self.gates(x)
        gate = rows.unsqueeze(3) * columns.unsqueeze(2)
        return tell_gate(x, 1 + gate if self.skip else gate, note="the input is added" * self.skip)
