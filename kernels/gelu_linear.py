"""The second half of an MLP, whose hidden map, its largest tensor, is kept once for the backward pass and not thrice.

torch keeps what the depthwise convolution takes, what the GELU takes and what the linear layer takes. The last two are
made again here, a cache-sized piece at a time, in both passes: on a CPU fresh memory for all of a large map costs more.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import onednn
from .backends import Backend, choose, function_obstacle, report
from .depthwise import depthwise_conv2d, depthwise_gradients
from .second_order import gradients_by, is_batched

# Numbers of a piece of the hidden map, for each thread.
_PIECE = 2**19
# From how many numbers on making the map again costs less than keeping it.
_LARGE = 2**23


class Problem(NamedTuple):
    """A checked call of `gelu_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    residual: bool


def _convolve(problem: Problem) -> Tensor:
    x, _, _, conv_weight, conv_bias, residual = problem
    if conv_weight is None:
        return x
    return depthwise_conv2d(x.permute(0, 3, 1, 2), conv_weight, conv_bias, residual=residual).permute(0, 2, 3, 1)


def _reference(problem: Problem) -> Tensor:
    return F.linear(F.gelu(_convolve(problem)), problem.weight, problem.bias)


def _pieces(problem: Problem) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the positions, all images' in one row, and what the GELU takes there."""
    x = problem.x
    at_once = _PIECE * torch.get_num_threads()
    if problem.conv_weight is None:
        rows = x.flatten(0, -2)
        step = max(1, at_once // x.shape[-1])
        for start in range(0, len(rows), step):
            yield slice(start, start + step), rows[start : start + step]
        return
    batch, height, width, channels = x.shape
    halo = problem.conv_weight.shape[2] // 2
    step = max(1, at_once // (width * channels))
    for image in range(batch):
        for top in range(0, height, step):
            bottom = min(top + step, height)
            first = max(top - halo, 0)
            # Rows of zeros that pad the band where the map goes on reach no further than the halo.
            band = _convolve(problem._replace(x=x[image : image + 1, first : bottom + halo]))
            start = (image * height + top) * width
            yield slice(start, start + (bottom - top) * width), band[0, top - first : bottom - first].flatten(0, 1)


class _Recomputed(Function):
    @staticmethod
    def forward(ctx, residual: bool, *tensors: Tensor | None) -> Tensor:
        problem = Problem(*tensors, residual)
        # Not the bias: no gradient depends on it, and it may change in place as that of torch's layer may.
        ctx.residual = residual
        ctx.save_for_backward(*problem._replace(bias=None)[:5])
        x, weight, bias = problem[:3]
        out = x.new_empty(*x.shape[:-1], len(weight))
        rows = out.flatten(0, -2)
        by_onednn = _by_onednn(problem)
        for piece, hidden in _pieces(problem):
            if by_onednn:
                rows[piece] = onednn.linear(F.gelu(hidden), weight, bias)
            elif bias is None:
                torch.mm(F.gelu(hidden), weight.t(), out=rows[piece])
            else:
                torch.addmm(bias, F.gelu(hidden), weight.t(), out=rows[piece])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        problem, needs = Problem(*ctx.saved_tensors, ctx.residual), ctx.needs_input_grad[1:]
        with torch.autocast("cpu", enabled=False):  # around the backward pass too; the forward pass was without
            # Gradients that have gradients, and many at once (`is_grads_batched`), are those of torch's operators.
            again = torch.is_grad_enabled()
            gradients = _by_reference(problem, grad, needs, again) if again or is_batched(grad) else None
            return None, *(gradients or _gradients(problem, grad, needs))


def _by_onednn(problem: Problem) -> bool:
    return problem.x.dtype == torch.float32 and onednn.is_faster_than_blas()


def _by_reference(problem: Problem, grad: Tensor, needs: tuple[bool, ...], again: bool) -> list[Tensor | None]:
    """Return gradients by torch's operators, if ``again`` such as have gradients themselves."""

    def compute(*operands: Tensor | None) -> Tensor:
        return _reference(Problem(*operands, problem.residual))

    gradients = gradients_by(compute, grad, problem[:5], needs, again)
    return [*gradients[:2], grad.reshape(-1, len(problem.weight)).sum(0) if needs[2] else None, *gradients[3:]]


def _gradients(problem: Problem, grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    x, weight, _, conv_weight, conv_bias, residual = problem
    grads = grad.reshape(-1, len(weight))
    grad_bias = grads.sum(0) if needs[2] else None
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    before = needs[0] or needs[3] or needs[4]
    grad_hidden = x.new_empty(x.shape) if before else None
    by_onednn = _by_onednn(problem)
    for piece, hidden in _pieces(problem):
        if grad_weight is not None:
            part, inputs = grads[piece], F.gelu(hidden)
            grad_weight += onednn.weight_gradient(part, inputs) if by_onednn else part.t() @ inputs
        if grad_hidden is not None:
            into = grad_hidden.flatten(0, -2)[piece]
            product = onednn.product if by_onednn else torch.mm
            torch.ops.aten.gelu_backward.grad_input(product(grads[piece], weight), hidden, grad_input=into)
    if grad_hidden is None or conv_weight is None:
        return [grad_hidden, grad_weight, grad_bias, None, None]
    maps, inputs, of = grad_hidden.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), [needs[0], needs[3], needs[4]]
    grad_x, *of_conv = depthwise_gradients(maps, inputs, conv_weight, conv_bias, of)
    if grad_x is not None:
        grad_x = grad_x.permute(0, 2, 3, 1)
        grad_x = grad_x + grad_hidden if residual else grad_x
    return [grad_x, grad_weight, grad_bias, *of_conv]


def _obstacle(problem: Problem) -> str | None:
    if reason := function_obstacle():
        return reason
    given = [x for x in problem[:5] if x is not None]
    if any(x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) for x in given):
        return f"it is for float32 and float64 on CPUs; got {problem.x.dtype} on {problem.x.device}"
    if len({x.dtype for x in given}) > 1 or torch.is_autocast_enabled("cpu"):
        return "it computes in one precision"
    return "it takes nothing empty" if any(0 in x.shape for x in given) else None


def _drawback(problem: Problem) -> str | None:
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in problem[:5] if x is not None):
        return "nothing is kept where no gradient is wanted"
    if not problem.x.is_contiguous():
        return "it is faster where channels come last in memory only"
    return None if problem.x.numel() >= _LARGE else "keeping a small hidden map costs less than making it again"


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "recomputed": Backend(lambda problem: _Recomputed.apply(problem.residual, *problem[:5]), _obstacle, _drawback),
    "reference": Backend(_reference),
}


def gelu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Apply a GELU, by the error function, and a linear layer, after a depthwise convolution if there is one.

    Args:
        x: Map ``[B, H, W, hidden]``, or without a convolution ``[..., hidden]``.
        weight: ``[out, hidden]``.
        bias: ``[out]``.
        conv_weight: Of a depthwise convolution of stride 1 that keeps the map's size, ``[hidden, 1, h, w]``, h and w
            odd.
        conv_bias: ``[hidden]``.
        residual: Whether ``x`` is added to its convolution.
        backend: ``"reference"``, torch's operators; or ``"recomputed"`` (float32 and float64 on CPUs), which keeps no
            more than ``x`` for the backward pass, and makes the rest again a piece at a time. By default the latter for
            maps of 32 MB and more where gradients are wanted.

    Returns:
        ``[B, H, W, out]``, or ``[..., out]``. There are gradients of any order.

    Raises:
        ValueError: If the shapes don't fit, or there is no such backend or it cannot run; the message says why.

    Example:
        >>> gelu_linear(torch.randn(1, 5, 7, 32), torch.randn(8, 32)).shape
        torch.Size([1, 5, 7, 8])
    """
    problem = _checked(Problem(x, weight, bias, conv_weight, conv_bias, residual))
    return _BACKENDS[choose("gelu_linear", _BACKENDS, problem, backend)].run(problem)


def is_recomputed(x: Tensor) -> bool:
    """Return whether `gelu_linear` of ``x`` makes again what it doesn't keep."""
    problem = Problem(x, x, None, None, None, residual=False)
    return _obstacle(problem) is None and _drawback(problem) is None


def gelu_linear_backends(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    residual: bool = False,
    backend: str | None = None,
) -> dict[str, str]:
    """Say which backends can run a call of `gelu_linear`, whose arguments these are, and why the others cannot.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    problem = _checked(Problem(x, weight, bias, conv_weight, conv_bias, residual))
    return report("gelu_linear", _BACKENDS, problem, backend)


def _checked(problem: Problem) -> Problem:
    x, weight, _, conv_weight, _, _ = problem
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"gelu_linear takes x [..., hidden] and a weight [out, hidden]; got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    if conv_weight is None:
        return problem
    odd = conv_weight.ndim == 4 and all(size % 2 for size in conv_weight.shape[2:])
    if x.ndim != 4 or not odd or conv_weight.shape[:2] != (x.shape[3], 1):
        raise ValueError(
            "gelu_linear convolves maps [B, H, W, hidden] by a weight [hidden, 1, h, w] of odd h and w; "
            f"got {list(x.shape)} and {list(conv_weight.shape)}"
        )
    return problem
