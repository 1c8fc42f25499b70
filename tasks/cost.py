"""What a computation costs: multiply-adds of a forward pass, and the memory that is added at the peak."""

import contextlib
import ctypes
import multiprocessing
import re
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """Return the multiply-adds of a model on the meta device for one image of ``shape`` ``(C, H, W)``, as on the CPU.

    Raises:
        NotImplementedError: If an operator of the model can't run without data.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() / 2


def peak_memory(
    name: str,
    batch: int,
    size: int | tuple[int, int],
    device: str,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    **kwargs: Any,
) -> int:
    """Return by how many bytes inference on ``[batch, 3, *size]`` raises the memory in use, at its peak.

    Or, if ``train``, a forward and a backward pass; gradients count, an optimizer's state would come on top. On the CPU
    a fresh process measures, since a process keeps memory that earlier work has freed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        images = torch.empty(batch, 3, *to_2tuple(size), dtype=dtype, device="meta")
        return executor.submit(_peak_here, name, images, device, kwargs, torch.get_num_threads(), train).result()


def train_once(model: nn.Module, images: Tensor) -> None:
    """Run a forward pass and a backward pass from the squares of the outputs."""
    outputs = model(images)
    # Some models answer twice, or with losses of their own.
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    sum(output.float().square().mean() for output in outputs if isinstance(output, Tensor)).backward()


def _peak_here(name: str, like: Tensor, device: str, kwargs: dict, threads: int, train: bool) -> int:
    import foveate  # noqa: F401 (registers the models)

    torch.set_num_threads(threads)
    model = timm.create_model(name, **kwargs).eval().to(device, like.dtype)
    images = torch.randn_like(like, device=device)
    small = timm.create_model(name, **kwargs | {"img_size": 64}).eval() if "img_size" in kwargs else model
    # Libraries load, and their work spaces come, with the first call.
    first = images[:2, :, :64, :64]
    if train:
        train_once(small.to(device, like.dtype), first)
        small.zero_grad()
        return memory_growth(lambda: train_once(model.train(), images), device)
    with torch.inference_mode():
        small.to(device, like.dtype)(first[:1])
        return memory_growth(lambda: model(images), device)


def memory_growth(call: Callable[[], object], device: str) -> int:
    """Return by how many bytes ``call`` raises the memory in use at its peak, as far as the system says.

    On the CPU without glibc, memory that earlier work left to the process, and that the call takes again, is not seen.
    """
    before = _begin(device)
    call()
    return max(0, _most_memory(device) - before)


def _begin(device: str) -> int:
    """Return the bytes in use, and forget how many there were at most where the system can be told to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _most_memory(device)


def _most_memory(device: str) -> int:
    """Return the greatest number of bytes that were in use."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    try:
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except OSError:
        # Linux counts in kibibytes, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
