"""Linear layers over maps and tokens, whose channels come last."""

import torch
from torch import Tensor, nn

from ..kernels.backends import channels_come_last
from ..kernels.pointwise import compiled_linear, outruns_convolution, pointwise
from .layout import channels_last
from .pieces import finish_by_pieces, may_take_pieces
from .plain import compiles_to_onednn, is_plain, is_plain_gelu


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer on ``x`` ``[B, H, W, in]`` or ``[B, N, in]``, by the fastest operator if it is a plain one.

    A layer that is hooked, adapted, quantized or otherwise more than `torch.nn.Linear` is called as it is; so is every
    layer in a traced graph, which keeps it as a layer, but where a compiler would give it to a slow BLAS.

    Example:
        >>> apply_linear(torch.nn.Linear(16, 32), torch.randn(1, 5, 7, 16)).shape
        torch.Size([1, 5, 7, 32])
    """
    if torch.compiler.is_compiling():
        return compiled_linear(x, layer.weight, layer.bias, None) if compiles_to_onednn(layer, x) else layer(x)
    if torch.jit.is_tracing() or not is_plain(layer):
        return layer(x)
    return pointwise(x, layer.weight, layer.bias)


def apply_linear_gelu(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer, then an activation, as `apply_linear` calls the former: as one operator if both are plain.

    Example:
        >>> apply_linear_gelu(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.randn(1, 5, 7, 16)).shape
        torch.Size([1, 5, 7, 32])
    """
    if torch.compiler.is_compiling():
        if is_plain_gelu(act) and compiles_to_onednn(layer, x):
            return compiled_linear(x, layer.weight, layer.bias, "gelu")
        return act(apply_linear(layer, x))
    if torch.jit.is_tracing() or not is_plain(layer) or not is_plain_gelu(act):
        return act(apply_linear(layer, x))
    return pointwise(x, layer.weight, layer.bias, activation="gelu")


# Up to how many positions of a map torch's 1x1 convolution is slower on one thread than the product that it is, where
# gradients are wanted; beyond, the product's way to add the bias is.
_FEW_POSITIONS = 1024


def apply_pointwise(layer: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """Call a 1x1 convolution on ``x`` ``[B, in, H, W]``, and an activation, as a linear layer where that is faster.

    On CPUs that is so of maps whose channels come last in memory, in inference, and on one thread of small ones. A
    layer that is hooked, adapted, quantized or otherwise more than `torch.nn.Conv2d` is called as it is; so is every
    layer in a traced graph.

    Example:
        >>> apply_pointwise(torch.nn.Conv2d(16, 32, 1), torch.randn(1, 16, 5, 7)).shape
        torch.Size([1, 32, 5, 7])
    """
    if torch.compiler.is_compiling():
        return _compile_pointwise(layer, x, act)
    if not _as_linear(layer, x):
        return layer(x) if act is None else act(layer(x))
    fused = act is not None and is_plain_gelu(act)
    positions, weight = x.permute(0, 2, 3, 1), layer.weight.flatten(1)
    x = pointwise(positions, weight, layer.bias, activation="gelu" if fused else None).permute(0, 3, 1, 2)
    return x if act is None or fused else act(x)


def _compile_pointwise(layer: nn.Module, x: Tensor, act: nn.Module | None) -> Tensor:
    if not compiles_to_onednn(layer, x) or not _is_pointwise(layer) or not channels_come_last(x):
        return layer(x) if act is None else act(layer(x))
    fused = act is not None and is_plain_gelu(act)
    x = compiled_linear(x.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias, "gelu" if fused else None)
    x = x.permute(0, 3, 1, 2)
    return x if act is None or fused else act(x)


def _as_linear(layer: nn.Module, x: Tensor) -> bool:
    if torch.jit.is_tracing() or not is_plain(layer) or not _is_pointwise(layer):
        return False
    if not x.is_cpu or not channels_come_last(x):
        return False
    few = x.shape[2] * x.shape[3] <= _FEW_POSITIONS and torch.get_num_threads() == 1
    return few or outruns_convolution(x, layer.weight, layer.bias)


def for_pointwise(x: Tensor) -> Tensor:
    """Return ``x`` ``[B, C, H, W]``, or a copy, in the order in memory that `apply_pointwise` is fastest with."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return channels_last(x) if not traced and outruns_convolution(x, x, None) else x


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


# Hidden numbers that a CPU holds at once: 4 MB in float32.
_HIDDEN = 2**20


def positions_at_once(x: Tensor, hidden: int) -> int:
    """Return for how many positions of ``x`` ``[..., C]`` the hidden channels shall exist at once; 0 for all."""
    if not x.is_cpu or x.shape[:-1].numel() * hidden < 2 * _HIDDEN:
        return 0
    return max(1, _HIDDEN // hidden)


class PointwiseMlp(nn.Module):
    """Two linear layers around a GELU at each position; parameters are named as in `timm.layers.Mlp`.

    A CPU takes large maps in pieces: fresh memory for all hidden channels costs more than the product. In training the
    hidden map is kept once, before the GELU.

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
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` or ``[B, N, dim]`` to the same shape."""
        return self._feed_forward(x) if torch.jit.is_scripting() else self._forward_in_pieces(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        if not torch.is_grad_enabled():
            x = apply_linear_gelu(self.fc1, self.act, x)
            return self.drop(apply_linear(self.fc2, self.drop(x)))
        x = apply_linear(self.fc1, x)
        out = finish_by_pieces(x, self.act, self.drop, self.fc2)
        if out is not None:
            return out
        return self.drop(apply_linear(self.fc2, self.drop(self.act(x))))

    def _forward_in_pieces(self, x: Tensor) -> Tensor:
        free = may_take_pieces(x, self.fc1, self.act, self.drop, self.fc2)
        count = positions_at_once(x, self.fc1.out_features) if free else 0
        if count == 0:
            return self._feed_forward(x)
        parts = [self._feed_forward(part) for part in x.flatten(0, -2)[None].split(count, 1)]
        return torch.cat(parts, 1).reshape(x.shape)
