"""Whether a fast path may use a layer's parameters instead of calling the layer."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..kernels import onednn
from ..kernels.backends import exporting, is_exporting, is_transforming

# Of each kind of layer that a fast path stands in for, the forward that it knows.
_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.Conv2d, nn.GELU, nn.Dropout)}
_CALL = nn.Module.__call__
_ORDINARY = (nn.Parameter, Tensor)


def is_plain(*layers: nn.Module) -> bool:
    """Return whether each layer does what its kind does, with its parameters, and nobody looks on.

    Not plain is what is hooked (by `register_forward_hook`, by `torch.nn.utils.prune`, by a profiler for all modules at
    once), parametrized, quantized, wrapped by an adapter, replaced on the instance or the class, compiled by itself, or
    of a subclass. Such a layer must be called.
    """
    # What looks on while a graph is exported is the exporter.
    if (nn.Module.__call__ is not _CALL or _hooks_of_all_modules()) and not is_exporting():
        return False
    for layer in layers:  # a microsecond each: this runs at every call of a layer
        kind = type(layer)
        if (
            _FORWARDS.get(kind) is not kind.forward
            or "forward" in layer.__dict__
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or layer._compiled_call_impl is not None
            or layer._modules
            or layer._buffers
        ):
            return False
        for parameter in layer._parameters.values():
            # Quantized and distributed tensors are subclasses with rules of their own.
            if parameter is not None and type(parameter) not in _ORDINARY:
                return False
    return True


def is_plain_gelu(act: nn.Module) -> bool:
    """Return whether an activation is a plain GELU, by the error function."""
    return isinstance(act, nn.GELU) and act.approximate == "none" and is_plain(act)


def compiles_to_onednn(layer: nn.Module, x: Tensor) -> bool:
    """Return whether a compiled graph calls oneDNN for a plain layer: in inference on CPUs, where that is faster.

    Of a linear layer, than the BLAS that a compiler would take; of a convolution, which a compiler leaves to oneDNN in
    any case, since what follows it can be fused.
    """
    if exporting() or torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    if is_transforming():  # of whose derivatives, carried along without grad mode, the operator knows nothing
        return False
    faster = {nn.Linear: onednn.is_faster_than_blas(), nn.Conv2d: onednn.is_available()}
    if not faster.get(type(layer)) or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return is_plain(layer) and layer.weight.dtype == torch.float32


def _hooks_of_all_modules() -> bool:
    # torch has a function that says so only since 2.9; these are what `nn.Module.__call__` itself looks at.
    forward, backward = _module._global_forward_hooks, _module._global_backward_hooks
    return bool(forward or backward or _module._global_forward_pre_hooks or _module._global_backward_pre_hooks)
