"""A linear layer at every position of a map, or at every token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn
from .backends import Backend, choose, report


class Problem(NamedTuple):
    """A call of `pointwise`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None


def _activate(x: Tensor, problem: Problem) -> Tensor:
    return F.gelu(x) if problem.activation == "gelu" else x


def _linear(problem: Problem) -> Tensor:
    return _activate(F.linear(problem.x, problem.weight, problem.bias), problem)


def _onednn(problem: Problem) -> Tensor:
    """Call what inductor calls of oneDNN: code for the processor at hand, with no map between product and GELU."""
    activation = "none" if problem.activation is None else problem.activation
    bias = None if problem.bias is None else problem.bias.contiguous()  # an expanded one would be read as it isn't
    return torch.ops.mkldnn._linear_pointwise(problem.x, problem.weight, bias, activation, [], "none")


def _onednn_obstacle(problem: Problem) -> str | None:
    if problem.x.ndim < 2:
        return f"it takes [..., in] with two axes or more; got {list(problem.x.shape)}"
    return onednn.obstacle(*problem[:3])


def _onednn_drawback(problem: Problem) -> str | None:
    return onednn.drawback()


def _convolution(problem: Problem) -> Tensor:
    x, weight, bias = problem[:3]
    image = x if x.ndim == 4 else x.unsqueeze(2)
    # The permuted map is a channels_last one: nothing is copied on the way in or out.
    out = F.conv2d(image.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return _activate(out if x.ndim == 4 else out.squeeze(2), problem)


def _convolution_obstacle(problem: Problem) -> str | None:
    ndim = problem.x.ndim
    return None if ndim in (3, 4) else f"it takes [B, H, W, in] or [B, N, in]; got {ndim} axes"


def _convolution_drawback(problem: Problem) -> str | None:
    """Return why oneDNN, which generates code for the processor at hand, isn't faster than the BLAS's product."""
    x = problem.x
    if torch.compiler.is_compiling():
        return "a compiler chooses itself"
    if x.shape[1:-1].numel() <= 1:
        return "lone positions are no image to oneDNN"
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return "it is faster in float32 on CPUs only"
    if not onednn.is_available():
        return "oneDNN is not available"
    return "torch leaves oneDNN on a single thread" if torch.get_num_threads() == 1 else None


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "onednn": Backend(_onednn, _onednn_obstacle, _onednn_drawback),
    "convolution": Backend(_convolution, _convolution_obstacle, _convolution_drawback),
    "linear": Backend(_linear),
}


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    backend: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Apply a linear layer to the channels of each position, and an activation.

    Args:
        x: Map ``[B, H, W, in]``, or tokens ``[B, N, in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
        backend: ``"linear"``, the reference, ``"onednn"`` (float32 or bfloat16 on CPUs, without gradients: one operator
            with the activation in it) or ``"convolution"``, a 1x1 one. By default oneDNN where it can run, then the
            convolution where it is faster, which is in float32 on several threads of a CPU.
        activation: ``"gelu"``, or None.

    Returns:
        ``[B, H, W, out]``, or ``[B, N, out]``.

    Raises:
        ValueError: If there is no such backend or it cannot run; the message says why.

    Example:
        >>> pointwise(torch.randn(1, 5, 7, 16), torch.randn(32, 16)).shape
        torch.Size([1, 5, 7, 32])
    """
    problem = Problem(x, weight, bias, activation)
    return _BACKENDS[choose("pointwise", _BACKENDS, problem, backend)].run(problem)


def is_fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `pointwise` takes oneDNN's operator, which is faster than a layer's own call."""
    problem = Problem(x, weight, bias, None)
    return _onednn_obstacle(problem) is None and _onednn_drawback(problem) is None


def pointwise_backends(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None
) -> dict[str, str]:
    """Say which backends can run a call of `pointwise`, whose arguments these are, and why the others cannot.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    return report("pointwise", _BACKENDS, Problem(x, weight, bias, None), backend)
