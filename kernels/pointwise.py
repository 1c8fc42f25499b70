"""A linear layer at every position of a map, or at every token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import onednn
from .backends import Backend, choose, exporting, is_transforming, report


class Problem(NamedTuple):
    """A call of `pointwise`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None


def _activate(x: Tensor, problem: Problem) -> Tensor:
    if problem.activation != "gelu":
        return x
    if torch.compiler.is_compiling() or exporting() or x.requires_grad or is_transforming():
        return F.gelu(x)
    # Fresh memory costs a CPU more than the activation.
    return torch.ops.aten.gelu_(x)


def _linear(problem: Problem) -> Tensor:
    return _activate(F.linear(problem.x, problem.weight, problem.bias), problem)


def _onednn(problem: Problem) -> Tensor:
    """Call what inductor calls of oneDNN: code for the processor at hand, with no map between product and GELU."""
    return onednn.linear(*problem)


@torch.library.custom_op("foveate::linear", mutates_args=(), device_types="cpu")
def compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Do what `pointwise` does by oneDNN, as one operator of a compiled graph.

    Inductor knows oneDNN's own as an operator of frozen weights alone, and of float32 takes the BLAS's product.
    """
    return onednn.linear(x, weight, bias, activation)


@compiled_linear.register_fake
def _(x, weight, bias, activation):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _misfit(problem: Problem) -> str | None:
    """Return whether shapes don't fit, of which torch's linear layer says more than oneDNN's."""
    x, weight, bias, _ = problem
    fits = weight.ndim == 2 and x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    return None if fits else "shapes don't fit"


def _onednn_obstacle(problem: Problem) -> str | None:
    if problem.x.ndim < 2:
        return f"it takes [..., in] with two axes or more; got {list(problem.x.shape)}"
    return onednn.obstacle(*problem[:3])


class _Products(Function):
    """A linear layer on rows, and its gradients, by oneDNN."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return onednn.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx, grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        again = torch.is_grad_enabled()  # gradients of gradients take torch's products, which have them
        grad_rows = grad_weight = None
        with torch.autocast("cpu", enabled=False):  # around the backward pass too; the forward pass was without
            if ctx.needs_input_grad[0]:
                grad_rows = grads @ weight if again else onednn.product(grads, weight)
            if ctx.needs_input_grad[1]:
                grad_weight = grads.t() @ rows if again else onednn.weight_gradient(grads, rows)
            return grad_rows, grad_weight, grads.sum(0) if ctx.needs_input_grad[2] else None


def _with_gradients(problem: Problem) -> Tensor:
    x, weight, bias, _ = problem
    # Rows in and out: of more axes oneDNN's result is a view, which autograd lets nobody change in place.
    out = _Products.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return _activate(out.view(*x.shape[:-1], len(weight)), problem)


def _gradients_obstacle(problem: Problem) -> str | None:
    if problem.x.dtype != torch.float32:
        return f"it is for float32; got {problem.x.dtype}"
    if is_transforming():
        return "torch.func and dual numbers take torch's plain operators"
    with torch.no_grad():  # what forbids oneDNN's operator but that it has no derivatives
        return _onednn_obstacle(problem)


def _gradients_drawback(problem: Problem) -> str | None:
    if not onednn.is_faster_than_blas():
        return "torch's own products are as fast on this processor"
    if torch.get_num_threads() > 1 and _convolution_obstacle(problem) is None:
        return "torch's convolution is oneDNN's on several threads"
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
    if torch.get_num_threads() == 1:
        return "torch leaves oneDNN on a single thread"
    return None


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "onednn": Backend(
        _onednn, lambda problem: _misfit(problem) or _onednn_obstacle(problem), lambda problem: onednn.drawback()
    ),
    "onednn_trained": Backend(
        _with_gradients, lambda problem: _misfit(problem) or _gradients_obstacle(problem), _gradients_drawback
    ),
    "convolution": Backend(
        _convolution, lambda problem: _misfit(problem) or _convolution_obstacle(problem), _convolution_drawback
    ),
    "linear": Backend(_linear),
}
# Where nothing is faster than torch's own products, nothing else is asked.
_BLAS_FIRST = {"linear": _BACKENDS["linear"], **_BACKENDS}


def _blas_is_faster(x: Tensor, weight: Tensor) -> bool:
    # Of a weight that fits at all; torch says best what doesn't. A compiler chooses itself.
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or weight.ndim < 2:
        return False
    return onednn.is_slower_than_blas(weight.shape[1], x.numel())


def _preferred(x: Tensor, weight: Tensor) -> dict[str, Backend]:
    return _BLAS_FIRST if _blas_is_faster(x, weight) else _BACKENDS


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
            with the activation in it), ``"onednn_trained"`` (float32 on CPUs: its products, for the gradients too) or
            ``"convolution"``, a 1x1 one. By default oneDNN where it can run. With gradients in float32 on a CPU, the
            convolution on several threads, and on a single one oneDNN's products where the BLAS is slow. Where the
            BLAS is faster, linear in float32: on processors with AVX2 alone, and at most layers on Intel's with
            AVX-512.
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
    return _BACKENDS[choose("pointwise", _preferred(x, weight), problem, backend)].run(problem)


def outruns_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `pointwise` is faster than a 1x1 convolution of the same positions, with the channels last."""
    if x.is_cpu and _blas_is_faster(x, weight):
        return True
    return _onednn_obstacle(Problem(x, weight, bias, None)) is None and onednn.drawback() is None


def pointwise_backends(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None
) -> dict[str, str]:
    """Say which backends can run a call of `pointwise`, whose arguments these are, and why the others cannot.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    return report("pointwise", _preferred(x, weight), Problem(x, weight, bias, None), backend)
