"""Gradients of gradients, for operators whose backward pass is one too and has none of its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiate_gradients(
    compute: Callable[..., Sequence[Tensor]],
    grads: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    outer: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Differentiate the gradients of ``compute(*operands)``, as functions of these and of the outputs' gradients alone.

    Args:
        compute: The operator's outputs by operators that torch differentiates as often as wanted.
        grads: The gradients of its outputs, None where there is none.
        operands: Its operands; those that are None or whole numbers have no gradients.
        outer: The gradients of the operands' gradients, in the operands' order; None for zeros.

    Returns:
        The gradients of ``grads`` and then of ``operands``, None for zeros.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [_variable(x) for x in (*grads, *operands)]
        operands = tensors[len(grads) :]
        pairs = zip(compute(*operands), tensors, strict=False)  # the gradients of outputs come first
        outputs, output_grads = zip(*((out, x.to(out.dtype)) for out, x in pairs if x is not None), strict=True)
        firsts = iter(torch.autograd.grad(outputs, _variables(operands), output_grads, create_graph=True))
        pairs = [(next(firsts), x) for operand, x in zip(operands, outer, strict=True) if _is_variable(operand)]
        outputs, output_grads = zip(*((first, x) for first, x in pairs if x is not None), strict=True)
        seconds = iter(
            torch.autograd.grad(outputs, _variables(tensors), output_grads, create_graph=again, allow_unused=True)
        )
    return [next(seconds) if _is_variable(x) else None for x in tensors]


def _is_variable(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def _variables(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if _is_variable(x)]


def _variable(x: Tensor | None) -> Tensor | None:
    """Return ``x`` so that gradients arrive at it, and go on to where it is from."""
    if not _is_variable(x):
        return x
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
