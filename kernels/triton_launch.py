"""What the Triton paths share: when they can run, their notation for tile sizes, and the launch. Needs no Triton."""

import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import export_obstacle, transform_obstacle

LOG2E = math.log2(math.e)  # the kernels' exponentials are powers of two
_INSTALLED = importlib.util.find_spec("triton") is not None


class TileSize(NamedTuple):
    """A row of a kernel's table: the sizes for vectors of up to ``row_bytes``, padded to a power of two."""

    row_bytes: int
    own: int  # vectors that a program owns
    walked: int  # vectors of the other side that it takes at a time
    warps: int
    stages: int
    registers_free: bool = False  # for chips only whose matrix products leave their operands in shared memory


def size_for(table: Sequence[TileSize], row_bytes: int, registers_free: bool = False) -> TileSize:
    """Return the first row of a table that is for vectors of that length, and for such a chip."""
    return next(x for x in table if row_bytes <= x.row_bytes and x.registers_free <= registers_free)


def power_of_two(x: int, least: int = 16) -> int:
    """Return the least power of two that is ``x`` or more; by default one that matrix products take."""
    return max(least, 1 << (x - 1).bit_length())


def interpreted() -> bool:
    """Return whether Triton interprets its kernels, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle(x: Tensor, dim: int, most: int, multiplies_matrices: bool = True) -> str | None:
    """Return why Triton cannot take tensors like ``x`` with vectors of ``dim``, or None if it can.

    Args:
        x: A tensor of the call.
        dim: The longest vector.
        most: The longest vector that the kernels take.
        multiplies_matrices: Whether they use matrix products of ``x``'s dtype.
    """
    if not _INSTALLED:
        return "triton is not installed"
    if x.device.type not in ("cuda", "meta") and not interpreted():
        return f"it needs tensors on a GPU (or TRITON_INTERPRET=1, to debug); they are on {x.device}"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32; got {x.dtype}"
    if x.dtype == torch.bfloat16 and multiplies_matrices and interpreted():
        return "triton's interpreter multiplies bfloat16 as if it were integers"
    if not dim <= most:
        return f"it takes a dim per head of at most {most}; got {dim}"
    return export_obstacle() or transform_obstacle()


def off_gpu(x: Tensor) -> str | None:
    """Return why Triton is not chosen unless asked for, or None."""
    return None if x.is_cuda else "off the GPU it is interpreted"


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **named: Any) -> None:
    """Launch a kernel on a device: Triton itself takes the current one, whatever the tensors' is."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Triton 3.10 no longer fuses products and sums by default.
        kernel[grid](*arguments, **named, enable_fp_fusion=True)
