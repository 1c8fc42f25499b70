"""Gradients of gradients, for operators whose backward pass has none of its own."""

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


def gradients_by(
    compute: Callable[..., Tensor],
    grad: Tensor,
    operands: Sequence[Tensor | None],
    needs: Sequence[bool],
    again: bool = True,
) -> list[Tensor | None]:
    """Return the gradients of ``compute(*operands)`` that an operator's backward pass needs, by torch's operators.

    Args:
        compute: What the operator computes, by operators that torch differentiates.
        grad: The gradient of its output.
        operands: Its operands.
        needs: Which of them need a gradient.
        again: Whether the gradients are to be differentiated themselves.

    Returns:
        The gradients, None where none is needed.
    """
    with torch.enable_grad():
        # Views, so that where one operand was computed from another the way between them isn't counted here.
        views = [
            (x.view_as(x) if again else x.detach().requires_grad_()) if needed and x is not None else x
            for x, needed in zip(operands, needs, strict=True)
        ]
        places = [place for place, needed in enumerate(needs) if needed and operands[place] is not None]
        inputs = [views[place] for place in places]
        grads = torch.autograd.grad(compute(*views), inputs, grad, create_graph=again) if inputs else ()
    grad_of = dict(zip(places, grads, strict=True))
    return [grad_of.get(place) for place in range(len(operands))]


def is_batched(grad: Tensor) -> bool:
    """Return whether this stands for many gradients, which `torch.autograd.grad(is_grads_batched=True)` marks so."""
    return torch._C._dispatch_keys(grad).has(torch._C._dispatch_key_parse("Batched"))


def _is_variable(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def _variables(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if _is_variable(x)]


def _variable(x: Tensor | None) -> Tensor | None:
    """Return ``x`` so that gradients arrive at it, and go on to where it is from."""
    if not _is_variable(x):
        return x
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
