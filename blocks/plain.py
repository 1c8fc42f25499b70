"""Whether a fast path may use a layer's parameters instead of calling the layer."""

from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..kernels.backends import is_exporting

# Of each kind of layer that a fast path stands in for, the forward that it knows.
_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.Conv2d, nn.GELU, nn.Dropout)}
_CALL = nn.Module.__call__


def is_plain(*layers: nn.Module) -> bool:
    """Return whether each layer does what its kind does, with its parameters, and nobody looks on.

    Not plain is what is hooked (by `register_forward_hook`, by `torch.nn.utils.prune`, by a profiler for all modules at
    once), parametrized, quantized, wrapped by an adapter, replaced on the instance or the class, compiled by itself, or
    of a subclass. Such a layer must be called.
    """
    # What looks on while a graph is exported is the exporter.
    watched = not is_exporting() and (nn.Module.__call__ is not _CALL or _hooks_of_all_modules())
    return not watched and all(_is_plain(layer) for layer in layers)


def _hooks_of_all_modules() -> bool:
    # torch has a function that says so only since 2.9; these are what `nn.Module.__call__` itself looks at.
    forward, backward = _module._global_forward_hooks, _module._global_backward_hooks
    return bool(forward or backward or _module._global_forward_pre_hooks or _module._global_backward_pre_hooks)


def _is_plain(layer: nn.Module) -> bool:
    kind = type(layer)
    if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind] or "forward" in layer.__dict__:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if hooked or layer._compiled_call_impl is not None or layer._modules or layer._buffers:
        return False
    return all(_is_ordinary(getattr(layer, name, None)) for name in ("weight", "bias"))


def _is_ordinary(parameter: Tensor | None) -> bool:
    # Quantized and distributed tensors are subclasses with rules of their own.
    return parameter is None or type(parameter) in (Tensor, nn.Parameter)
