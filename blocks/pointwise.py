"""Linear layers over maps and tokens, whose channels come last."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

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


class PointwiseMlp(nn.Module):
    """Two linear layers around a GELU at each position; parameters are named as in `timm.layers.Mlp`.

    Args:
        dim: Channels.
        hidden: Channels between the layers.
        drop: Dropout rate after either layer.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``.

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
        """Map ``[B, H, W, dim]`` to the same shape."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
