"""Linear layers over maps and tokens, whose channels come last."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.fx import Proxy

from ..kernels.pointwise import pointwise


@torch.jit.ignore
def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Call the operator as one node of a traced graph: its backend depends on the input."""
    return pointwise(x, weight, bias)


register_notrace_function(project)


class PointwiseLinear(nn.Linear):
    """`torch.nn.Linear` with its parameters and its result, faster on maps and tokens on a CPU.

    Shape:
        ``[B, H, W, in_features]`` or ``[B, N, in_features]`` to the same with ``out_features`` channels.

    Example:
        >>> PointwiseLinear(16, 32)(torch.randn(1, 5, 7, 16)).shape
        torch.Size([1, 5, 7, 32])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, in_features]`` or ``[B, N, in_features]`` to ``out_features`` channels."""
        return project(x, self.weight, self.bias)


# Hidden numbers that a CPU holds at once: 8 MB in float32.
_HIDDEN = 2**21


@torch.jit.ignore
def positions_at_once(x: Tensor, hidden: int) -> int:
    """Return for how many positions of ``x`` ``[..., C]`` the hidden channels shall exist at once; 0 for all."""
    # Graphs are traced whole, and gradients need everything anyway.
    traced = isinstance(x, Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or torch.is_grad_enabled() or not x.is_cpu or x.shape[:-1].numel() * hidden < 2 * _HIDDEN:
        return 0
    return max(1, _HIDDEN // hidden)


class PointwiseMlp(nn.Module):
    """Two linear layers around a GELU at each position; parameters are named as in `timm.layers.Mlp`.

    Inference on a CPU takes large maps in pieces: fresh memory for all hidden channels costs more than the product.

    Args:
        dim: Channels.
        hidden: Channels between the layers.
        drop: Dropout rate after either layer.

    Shape:
        ``[B, H, W, dim]`` or ``[B, N, dim]`` to the same shape.

    Example:
        >>> PointwiseMlp(16, 64)(torch.randn(1, 5, 7, 16)).shape
        torch.Size([1, 5, 7, 16])
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = PointwiseLinear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.fc2 = PointwiseLinear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` or ``[B, N, dim]`` to the same shape."""
        count = positions_at_once(x, self.fc1.out_features)
        if count == 0:
            return self._feed_forward(x)
        parts = [self._feed_forward(part) for part in x.flatten(0, -2)[None].split(count, 1)]
        return torch.cat(parts, 1).reshape(x.shape)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
