"""Large kernel attention: convolutions over a large neighborhood, decomposed, gate the values; there is no softmax.

VAN's form stacks a convolution and a dilated one (arXiv 2202.09741, eq. 1), MSCAN's adds up pairs of strips (SegNeXt,
arXiv 2209.08575, eq. 1). Zeros are padded between the stacked convolutions, so that they are no single larger one.
"""

import torch
from torch import Tensor, nn

from .depthwise import apply_depthwise
from .pointwise import apply_pointwise
from .record import Recorded, tell_gate


class DilatedGate(nn.Module):
    """A map times its own 5x5 depthwise, 7x7 depthwise of dilation 3, and 1x1 convolution: 23x23 positions; NCHW.

    Args:
        dim: Channels.

    Shape:
        ``[B, dim, H, W]`` to the same shape; any H and W.

    Example:
        >>> DilatedGate(16)(torch.randn(1, 16, 5, 7)).shape
        torch.Size([1, 16, 5, 7])
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.local = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.dilated = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim, **dd)
        self.mix = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Return what ``x`` ``[B, dim, H, W]`` is multiplied by, of the same shape."""
        local = self.local(x)
        wide = self.dilated(local) if torch.jit.is_scripting() else apply_depthwise(self.dilated, local)
        return self.mix(wide) if torch.jit.is_scripting() else apply_pointwise(self.mix, wide)

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        return tell_gate(x, self.gate(x), signed=True)


class StripGate(nn.Module):
    """A map times a 1x1 convolution of the sum of a 5x5 depthwise one and, of that, pairs of strips; NCHW.

    Args:
        dim: Channels.
        lengths: Of the strips, odd; each is a row, then a column.

    Shape:
        ``[B, dim, H, W]`` to the same shape; any H and W.

    Example:
        >>> StripGate(16)(torch.randn(1, 16, 5, 7)).shape
        torch.Size([1, 16, 5, 7])
    """

    def __init__(self, dim: int, lengths: tuple[int, ...] = (7, 11, 21), device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.local = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.rows = nn.ModuleList(nn.Conv2d(dim, dim, (1, k), padding=(0, k // 2), groups=dim, **dd) for k in lengths)
        self.columns = nn.ModuleList(
            nn.Conv2d(dim, dim, (k, 1), padding=(k // 2, 0), groups=dim, **dd) for k in lengths
        )
        self.mix = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Return what ``x`` ``[B, dim, H, W]`` is multiplied by, of the same shape."""
        local = self.local(x)
        total = local
        for row, column in zip(self.rows, self.columns):  # noqa: B905 (TorchScript knows no strict)
            strip = row(local) if torch.jit.is_scripting() else apply_depthwise(row, local)
            total = total + (column(strip) if torch.jit.is_scripting() else apply_depthwise(column, strip))
        return self.mix(total) if torch.jit.is_scripting() else apply_pointwise(self.mix, total)

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        return tell_gate(x, self.gate(x), signed=True)


_GATES = {"dilated": DilatedGate, "strips": StripGate}


class LargeKernelAttention2d(nn.Module):
    """Projection, GELU, a gate of large kernels, projection; and the input added to it.

    Args:
        dim: Channels.
        gate: ``"dilated"``, `DilatedGate` as in VAN, or ``"strips"``, `StripGate` as in MSCAN.
        channels_first: Whether maps are NCHW instead of NHWC; on CPUs it is faster if their channels come last in
            memory either way.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, or ``[B, dim, H, W]`` with ``channels_first``; any H and W, also below
        the kernels' size.

    Raises:
        ValueError: If there is no such gate.

    Example:
        >>> LargeKernelAttention2d(16)(torch.randn(1, 5, 7, 16)).shape
        torch.Size([1, 5, 7, 16])
    """

    def __init__(self, dim: int, gate: str = "dilated", channels_first: bool = False, device=None, dtype=None):
        super().__init__()
        if gate not in _GATES:
            raise ValueError(f"there is no gate {gate!r}; there are {', '.join(map(repr, _GATES))}")
        dd = {"device": device, "dtype": dtype}
        self.channels_first = channels_first
        self.proj1 = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.gate = _GATES[gate](dim, **dd)
        self.proj2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]``, or ``[B, dim, H, W]`` with ``channels_first``, to the same shape."""
        if not self.channels_first:
            x = x.permute(0, 3, 1, 2)
        inner = self.act(self.proj1(x) if torch.jit.is_scripting() else apply_pointwise(self.proj1, x))
        inner = self.gate(inner)
        x = (self.proj2(inner) if torch.jit.is_scripting() else apply_pointwise(self.proj2, inner)) + x
        return x if self.channels_first else x.permute(0, 2, 3, 1)
