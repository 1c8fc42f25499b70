"""oneDNN's operators that inductor calls too: when they may be called without a compiler, and linear layers by them."""

import contextlib
import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from .backends import export_obstacle, in_forward_mode


@functools.cache
def _has_operators() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


@functools.cache
def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.compiler.assume_constant_result  # a compiler can't follow the questions
def is_available() -> bool:
    """Return whether torch has oneDNN, with these operators, and may use it."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and _has_operators()


@functools.cache
def _is_amd() -> bool:
    described = platform.processor()
    with contextlib.suppress(OSError):
        described += Path("/proc/cpuinfo").read_text()
    return "AuthenticAMD" in described


@functools.cache
def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


@torch.compiler.assume_constant_result
def is_faster_than_blas() -> bool:
    """Return whether torch's BLAS is far slower here than what oneDNN compiles: MKL leaves AMD's AVX-512 unused.

    At 784 x 256 x 768, one thread: 105 and 245 GFLOP/s (EPYC, AVX-512, torch 2.14).
    """
    return is_available() and torch.backends.mkl.is_available() and _is_amd() and _capability() == "AVX512"


def is_slower_than_blas(inputs: int, numbers: int) -> bool:
    """Return whether torch's BLAS is faster here than oneDNN at such a linear layer, in float32.

    MKL is where there is AVX2 alone. Over oneDNN's time for the linear layers of nat_tiny, one thread: 1.0 at 56x56 to
    0.8 at 7x7, gradients of weights 0.85 to 0.65, and 0.7 with the GELU, which oneDNN computes in its product (EPYC,
    AVX2, torch 2.14). On Intel's processors with AVX-512 it takes 0.8 to 0.97 and 0.65 to 0.85 with the gradients, but
    for few inputs, at which it takes up to 1.8, unless the map is small too: 0.45 to 1 (Xeon with AMX, torch 2.14).

    Args:
        inputs: Channels of the map that it takes.
        numbers: That map's numbers.
    """
    if not torch.backends.mkl.is_available():
        return False
    if _capability() == "AVX2":
        return True
    return _capability() == "AVX512" and not _is_amd() and (inputs >= 128 or numbers < 2**18)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Apply a linear layer, and an activation, by oneDNN; see `obstacle`."""
    bias = None if bias is None else bias.contiguous()  # an expanded one would be read as it isn't
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation or "none", [], "none")


def product(x: Tensor, other: Tensor) -> Tensor:
    """Return ``x @ other`` of two matrices by oneDNN; see `obstacle`."""
    return linear(x, other.t())


def weight_gradient(grads: Tensor, x: Tensor) -> Tensor:
    """Return ``grads.T @ x``, of rows for each position, by oneDNN, which is faster at few rows than at few columns."""
    if grads.shape[1] > x.shape[1]:
        return linear(x.t(), grads.t()).t()
    return linear(grads.t(), x.t())


def obstacle(*tensors: Tensor | None) -> str | None:
    """Return why such an operator cannot run on these tensors, or None if it can."""
    if torch.compiler.is_compiling():  # asked first: what follows can't be traced
        return "a compiler chooses itself"
    if reason := export_obstacle():  # before a traced shape is looked at
        return reason
    dtype, differentiating = tensors[0].dtype, torch.is_grad_enabled()
    for x in tensors:  # one loop: this runs at every call of a layer
        if x is None:
            continue
        if not x.is_cpu or x.dtype != dtype or dtype not in (torch.float32, torch.bfloat16):
            return f"it is for float32 or bfloat16 on CPUs; got {x.dtype} on {x.device}"
        if differentiating and x.requires_grad:
            return "it has no derivatives"
        if x.numel() == 0:
            return f"it takes nothing empty; got {list(x.shape)}"
    if dtype == torch.bfloat16 and not _has_bfloat16():
        return "this processor has no products of bfloat16"
    if in_forward_mode():
        return "it has no derivatives"
    return None if is_available() else "torch has no oneDNN here"


def drawback() -> str | None:
    """Return why such an operator is not chosen unless it is asked for, or None."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func's transforms take torch's plain operators"
    return "autocast chooses the precision" if torch.is_autocast_enabled("cpu") else None
