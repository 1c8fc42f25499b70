"""A convolution of each channel by itself, with kernels that processors' libraries are slow at.

oneDNN generates code for a depthwise convolution only while its kernel is narrow. Beyond that it is 5 to 40 times
slower, though a dilated convolution is a plain one on each of its interleaved grids, and a wide one is fast on a map
whose channels come last. For the gradients of the weights it has such code up to a width of 3, and is 8 to 25 times
slower than it could be beyond; those of the map are a convolution as well, at which its forward pass is the faster one.
Of 3x3 kernels both can be made in one walk over the maps, in 0.5 to 0.75 of its time.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import depthwise_native, onednn
from .backends import Backend, channels_come_last, choose, exporting, function_obstacle, report
from .second_order import gradients_by, is_batched

# How far a kernel may reach beside its centre: oneDNN keeps that many vectors in registers.
_REACH = 6 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4
# The widest kernel that it is fast at.
NARROW = 2 * _REACH + 1


class Problem(NamedTuple):
    """A call of `depthwise_conv2d`; dilation, padding and stride as (y, x)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dilation: tuple[int, int]
    padding: tuple[int, int]
    residual: bool = False
    activation: str | None = None
    stride: tuple[int, int] = (1, 1)

    def output_size(self) -> list[int]:
        sizes = zip(self.x.shape[2:], self.weight.shape[2:], self.dilation, self.padding, self.stride, strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, d, p, s in sizes]


def _convolution(problem: Problem) -> Tensor:
    x, weight, bias, dilation, padding = problem[:5]
    return _finish(F.conv2d(x, weight, bias, problem.stride, padding, dilation, len(weight)), problem)


def _finish(out: Tensor, problem: Problem) -> Tensor:
    if problem.residual:
        # In place of the convolution, which no gradient needs: large maps cost time to allocate.
        out = out.add_(problem.x) if out.dtype == problem.x.dtype else problem.x + out
    return F.gelu(out) if problem.activation == "gelu" else out


@functools.cache
def _identity(height: int, width: int, dtype: torch.dtype) -> Tensor:
    kernel = torch.zeros(1, 1, height, width, dtype=dtype)
    kernel[..., height // 2, width // 2] = 1
    return kernel


def _onednn(problem: Problem) -> Tensor:
    x, weight, bias, dilation, padding = problem[:5]
    if problem.residual:
        # The map itself is what a kernel of 1 in its centre makes of it.
        weight = weight + _identity(*weight.shape[2:], weight.dtype)
    activation = "none" if problem.activation is None else problem.activation
    bias = None if bias is None else bias.contiguous()
    options = (list(padding), [1, 1], list(dilation), len(weight))
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *options, activation, [], "none")


class _Convolution(Function):
    """A convolution with gradients of the map by oneDNN's forward pass, and of the weights in C."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple) -> Tensor:
        ctx.stride, ctx.padding = stride, padding
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs, again = ctx.needs_input_grad, torch.is_grad_enabled()
        with torch.autocast("cpu", enabled=False):  # around the backward pass too; the forward pass was without
            # Gradients that have gradients, and many at once (`is_grads_batched`), are those of torch's operators.
            if again or is_batched(grad):
                options = {"stride": ctx.stride, "padding": ctx.padding, "groups": len(weight)}
                of_operands = gradients_by(lambda *a: F.conv2d(*a, **options), grad, (x, weight), needs[:2], again)
                return *of_operands, grad.sum((0, 2, 3)) if needs[2] else None, None, None
            problem = Problem(x, weight, None, (1, 1), ctx.padding, stride=ctx.stride)
            return *_gradients_in_c(grad, problem, needs), None, None


def _gradients_in_c(grad: Tensor, problem: Problem, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a convolution's map, weight and bias, as far as needed."""
    x, weight, padding, stride = problem.x, problem.weight, problem.padding, problem.stride
    grad = grad.contiguous(memory_format=torch.channels_last)
    if needs[0] and needs[1] and _is_square(problem):
        grad_x, grad_weight, grad_bias = depthwise_native.square_gradients(grad, x, weight)
        return _like(grad_x, x), grad_weight, grad_bias if needs[2] else None
    grad_x = _map_gradient(grad, problem) if needs[0] else None
    grad_weight = grad_bias = None
    if needs[1] or needs[2]:
        grad_weight, grad_bias = depthwise_native.weight_gradients(grad, x, weight.shape[2:], padding, stride)
    return grad_x, grad_weight, grad_bias if needs[2] else None


def _map_gradient(grad: Tensor, problem: Problem) -> Tensor:
    if problem.stride != (1, 1):
        return _torchs_gradients(grad, problem, (True, False, False))[0]
    weight = problem.weight
    padding = [size - 1 - p for size, p in zip(weight.shape[2:], problem.padding, strict=True)]
    return _like(F.conv2d(grad, weight.flip(2, 3), padding=padding, groups=len(weight)), problem.x)


def _torchs_gradients(grad: Tensor, problem: Problem, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    x, weight, bias, dilation, padding = problem[:5]
    sizes = None if bias is None else [len(bias)]
    options = (sizes, problem.stride, padding, dilation, False, (0, 0), len(weight), list(needs))
    return torch.ops.aten.convolution_backward(grad, x, weight, *options)


def _trained(problem: Problem) -> Tensor:
    return _finish(_Convolution.apply(*problem[:3], problem.stride, problem.padding), problem)


def _convolve(problem: Problem) -> Tensor:
    """Convolve as torch does, or with faster gradients, what a backend has laid out for it."""
    return _PLAIN[choose("depthwise_conv2d", _PLAIN, problem, None)].run(problem)


@torch.library.custom_op("foveate::depthwise", mutates_args=(), device_types="cpu")
def compiled_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    residual: bool,
    activation: str | None,
) -> Tensor:
    """Do what `depthwise_conv2d` does by oneDNN where the map keeps its size, as one operator of a compiled graph.

    Inductor fuses what follows a convolution with frozen weights alone.
    """
    return _onednn(Problem(x, weight, bias, (1, 1), tuple(padding), residual, activation))


@compiled_depthwise.register_fake
def _(x, weight, bias, padding, residual, activation):
    return torch.empty_like(x, memory_format=torch.channels_last)


def _like(out: Tensor, x: Tensor) -> Tensor:
    return _with_channels_last(out) if channels_come_last(x) else out.contiguous()


def _with_channels_last(x: Tensor) -> Tensor:
    # Said so that torch.vmap understands.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _channels_last(problem: Problem) -> Tensor:
    return _like(_convolve(problem._replace(x=_with_channels_last(problem.x))), problem.x)


def _interleaved(problem: Problem) -> Tensor:
    """Convolve each of the grids of every ``dilation``-th row and column, which don't see each other, as one batch.

    Of a padding that is no multiple of the dilation, the rest is put on the map, which moves it to another grid.
    """
    x, weight, bias, (dy, dx), (py, px) = problem[:5]
    height, width = problem.output_size()
    rest_y, rest_x = py % dy, px % dx
    batch, channels, rows, columns = x.shape
    rows, columns = rows + 2 * rest_y, columns + 2 * rest_x
    fill_y, fill_x = -rows % dy, -columns % dx
    # Channels come last: what moves is then a whole pixel.
    maps = F.pad(x.permute(0, 2, 3, 1), (0, 0, rest_x, rest_x + fill_x, rest_y, rest_y + fill_y))
    rows, columns = (rows + fill_y) // dy, (columns + fill_x) // dx
    grids = maps.reshape(batch, rows, dy, columns, dx, channels).permute(2, 4, 0, 1, 3, 5)
    grids = grids.reshape(dy * dx * batch, rows, columns, channels).permute(0, 3, 1, 2)
    out = _convolve(Problem(grids, weight, bias, (1, 1), (py // dy, px // dx))).permute(0, 2, 3, 1)
    rows, columns = out.shape[1:3]
    out = out.reshape(dy, dx, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
    out = out.reshape(batch, rows * dy, columns * dx, channels)[:, :height, :width]
    return _finish(_like(out.permute(0, 3, 1, 2), x), problem)


def _stride_obstacle(problem: Problem) -> str | None:
    return None if problem.stride == (1, 1) else "it has no strides"


def _dilation_obstacle(problem: Problem) -> str | None:
    return _stride_obstacle(problem) or (None if max(problem.dilation) > 1 else "the kernel is not dilated")


def _drawback(problem: Problem) -> str | None:
    """Return why oneDNN's own choice for the map as it lies isn't slow."""
    if exporting():
        return "an exported graph keeps the layer"
    if problem.x.device.type != "cpu":
        return "it is faster on CPUs only"
    if not onednn.is_available():
        return "oneDNN is not available"
    (height, width), (dy, dx) = problem.weight.shape[2:], problem.dilation
    if (width - 1) * dx < NARROW and ((height - 1) * dy < NARROW or max(dy, dx) == 1):
        return "oneDNN is fast at narrow kernels"
    return None


def _channels_last_drawback(problem: Problem) -> str | None:
    if channels_come_last(problem.x):
        return "the channels come last already"
    if problem.x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return "it is faster in float32 only"
    return _drawback(problem)


def _trained_obstacle(problem: Problem) -> str | None:
    if reason := function_obstacle():
        return reason
    x, weight, bias, dilation, padding = problem[:5]
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if not tensor.is_cpu or tensor.dtype != torch.float32:
            return f"it is for float32 on CPUs; got {tensor.dtype} on {tensor.device}"
        if tensor.numel() == 0:
            return f"it takes nothing empty; got {list(tensor.shape)}"
    if max(dilation) > 1:
        return "the kernel is dilated"
    if any(p >= size for p, size in zip(padding, weight.shape[2:], strict=True)):
        return "the padding is wider than the kernel reaches"
    return depthwise_native.obstacle()


def _is_square(problem: Problem) -> bool:
    """Return whether all gradients can be made at once: a 3x3 kernel keeps the size of a map of so many channels."""
    one = problem.stride == problem.dilation == problem.padding == (1, 1)
    return one and problem.weight.shape[2:] == (3, 3) and problem.x.shape[1] % depthwise_native.LANES == 0


def _narrow_drawback(problem: Problem) -> str | None:
    height, width = problem.weight.shape[2:]
    if width > 3 or height > problem.x.shape[2]:
        return None
    fast = _is_square(problem) and channels_come_last(problem.x)
    return None if fast else "oneDNN is as fast at so narrow a kernel"


def _trained_drawback(problem: Problem) -> str | None:
    x, weight, bias = problem[:3]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, weight, bias) if t is not None):
        return "no gradient is wanted"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the precision"
    return _narrow_drawback(problem)


def _onednn_obstacle(problem: Problem) -> str | None:
    if problem.residual and not all(length % 2 for length in problem.weight.shape[2:]):
        return "an even kernel has no centre to add the map by"
    if reason := _stride_obstacle(problem):
        return reason
    if problem.residual and problem.x.dtype == torch.bfloat16:
        return "a weight in bfloat16 is lost beside the 1 that adds the map"
    return onednn.obstacle(*problem[:3])


def _onednn_drawback(problem: Problem) -> str | None:
    if not problem.residual and problem.activation is None:
        return "nothing is there to be fused"
    if not channels_come_last(problem.x):
        return "it is faster where channels come last only"
    return onednn.drawback()


# In order of preference.
_PLAIN: dict[str, Backend] = {
    "trained": Backend(_trained, _trained_obstacle, _trained_drawback),
    "convolution": Backend(_convolution),
}
_BACKENDS: dict[str, Backend] = {
    "interleaved": Backend(_interleaved, _dilation_obstacle, _drawback),
    "channels_last": Backend(_channels_last, _stride_obstacle, _channels_last_drawback),
    "onednn": Backend(_onednn, _onednn_obstacle, _onednn_drawback),
    **_PLAIN,
}


def _problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int | tuple[int, int],
    padding: int | tuple[int, int] | None,
    residual: bool,
    activation: str | None,
    stride: int | tuple[int, int],
) -> Problem:
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[:2] != (x.shape[1], 1):
        raise ValueError(
            "a depthwise convolution takes a map [B, C, H, W] and a weight [C, 1, h, w]; "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    (dy, dx), stride = (pair if isinstance(pair, tuple) else (pair, pair) for pair in (dilation, stride))
    if min(dy, dx, *stride) < 1:
        raise ValueError(f"dilation and stride must be positive, got {dilation} and {stride}")
    if padding is None:
        height, width = weight.shape[2:]
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(f"a {height}x{width} kernel has no centre that keeps the size of the map; give padding")
        padding = (height // 2 * dy, width // 2 * dx)
    py, px = (padding, padding) if isinstance(padding, int) else padding
    if min(py, px) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    if activation not in (None, "gelu"):
        raise ValueError(f"activation is 'gelu' or None; got {activation!r}")
    problem = Problem(x, weight, bias, (dy, dx), (py, px), residual, activation, stride)
    if any(size < 1 for size in problem.output_size()):  # min() would bind the sizes of a compiled graph to each other
        raise ValueError(
            f"a {weight.shape[2]}x{weight.shape[3]} kernel of dilation {(dy, dx)} does not fit into a map of "
            f"{x.shape[2]}x{x.shape[3]} with padding {(py, px)}"
        )
    if residual and problem.output_size() != list(x.shape[2:]):
        raise ValueError(
            f"a map of {list(x.shape[2:])} can't be added to a convolution of {problem.output_size()}; "
            "give the padding that keeps its size"
        )
    return problem


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | None = None,
    backend: str | None = None,
    residual: bool = False,
    activation: str | None = None,
    stride: int | tuple[int, int] = 1,
) -> Tensor:
    """Convolve each channel with a kernel of its own, as `torch.nn.functional.conv2d` does, and finish it.

    Args:
        x: Map ``[B, C, H, W]``, in any memory format, which is that of the output too.
        weight: ``[C, 1, h, w]``.
        bias: ``[C]``.
        dilation: Distance of the kernel's rows and columns on the map.
        padding: Zeros on each side of the map; by default as many as keep its size at stride 1, which takes odd
            kernels.
        backend: ``"convolution"``, the reference, which is torch's own; ``"interleaved"``, a plain convolution on each
            of the grids of every ``dilation``-th row and column; ``"channels_last"``; ``"onednn"`` (float32, or
            bfloat16 if no map is added, on CPUs, without gradients: one operator with all that follows in it); or
            ``"trained"`` (float32 on CPUs, where C was compiled: gradients by loops in C). By default the fastest: on a
            CPU, interleaved for dilated kernels and channels last for plain ones, where they are wide, else oneDNN;
            for gradients ``"trained"``, also within the first two, but of narrow kernels that aren't 3x3 on a map whose
            channels come last.
        residual: Whether to add the map.
        activation: ``"gelu"`` of the sum, or None.
        stride: Of the kernel's rows and columns; ``"trained"`` and ``"convolution"`` have it.

    Returns:
        ``[B, C, H + 2 p - dilation (h - 1), W + 2 p - dilation (w - 1)]`` at stride 1.

    Raises:
        ValueError: If the shapes do not fit, the kernel does not fit into the padded map, there is no such activation,
            or no such backend or it cannot run; the message says why.

    Example:
        >>> depthwise_conv2d(torch.randn(1, 8, 5, 9), torch.randn(8, 1, 7, 7), dilation=3).shape
        torch.Size([1, 8, 5, 9])
    """
    problem = _problem(x, weight, bias, dilation, padding, residual, activation, stride)
    return _BACKENDS[choose("depthwise_conv2d", _BACKENDS, problem, backend)].run(problem)


def depthwise_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a depthwise convolution that keeps the map's size, by what is fastest at them.

    Args:
        grad: The output's, ``[B, C, H, W]``.
        x: The map.
        weight: ``[C, 1, h, w]``, h and w odd.
        bias: ``[C]``, or None.
        needs: Which are wanted, of x, weight and bias.
    """
    problem = Problem(x, weight, bias, (1, 1), tuple(size // 2 for size in weight.shape[2:]))
    if _trained_obstacle(problem) is None and _narrow_drawback(problem) is None:
        return _gradients_in_c(grad, problem, needs)
    return _torchs_gradients(grad, problem, needs)


def depthwise_backends(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | None = None,
    backend: str | None = None,
    residual: bool = False,
    activation: str | None = None,
    stride: int | tuple[int, int] = 1,
) -> dict[str, str]:
    """Say which backends can run a call of `depthwise_conv2d`, whose arguments these are, and why the others cannot.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    problem = _problem(x, weight, bias, dilation, padding, residual, activation, stride)
    return report("depthwise_conv2d", _BACKENDS, problem, backend)
