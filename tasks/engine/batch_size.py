"""``batch_size="auto"``: the largest batch that fits, found by trying."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from ...zoo.library_errors import first_line
from .. import TaskError
from .runner import TaskModel

AUTO = "auto"
# Where memory isn't measured, and for evaluations.
FIXED = 16
# Sizes that are tried end here, and leave an epoch this many batches.
_LARGEST, _LEAST_BATCHES = 1024, 8
# Of the memory that is free; what a library takes, and larger images of later batches, need the rest.
_SHARE = 0.85
# Samples that a batch is tried with; more are these again.
_SAMPLES = 32


def placeholder(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose batch size is a number, until it is settled: one that every task takes."""
    return config | {"batch_size": 2} if config["batch_size"] == AUTO else config


def settle(
    config: dict[str, Any], task: Any, loader: DataLoader, device: torch.device, checkpoint: dict | None
) -> tuple[int, str]:
    """Return the size of each process's batches where the config leaves it open, and what to say of it.

    Args:
        config: The run's, with ``batch_size="auto"``.
        task: Its task.
        loader: Of the training set, of whatever batch size.
        device: What trains.
        checkpoint: Of a run that goes on, which keeps the images of a step.

    Raises:
        TaskError: If not even one image fits.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if checkpoint is not None:
        whole = checkpoint["config"]["batch_size"] * checkpoint["meta"]["processes"]
        return max(1, whole // processes), f"batch_size=auto: {whole // processes}, as the run was begun"
    if not measures_memory(device):
        return FIXED, f"batch_size=auto: {FIXED}; what fits is tried on CUDA alone"
    most = max(1, min(_LARGEST, len(loader.dataset) // processes // _LEAST_BATCHES))
    model = TaskModel(task, config, device)
    model = model.to(device, memory_format=model.memory_format).train()
    size = largest(lambda count: _fits(model, loader, count, config, device), most)
    if torch.distributed.is_initialized():
        smallest = torch.tensor(size, device=device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        size = int(smallest)
    if size == 0:
        raise TaskError(
            f"batch_size=auto: not even one image fits into the memory of {device}; make the images or the model "
            "smaller, or set precision=bfloat16 or grad_checkpointing=True"
        )
    return size, f"batch_size=auto: {size}, the largest tried that fits into {device} and leaves 8 batches an epoch"


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest size up to ``most`` that fits, of 2, 4, 6, 8, 12, 16, 24 and so on, else 1; 0 if none does."""
    size_that_fits = 0
    for size in _sizes(most):
        if not fits(size):
            break
        size_that_fits = size
    # Batch norms and mixtures want two images at least.
    return size_that_fits or int(fits(1))


def _sizes(most: int) -> Iterator[int]:
    size = 2
    while size <= most:
        yield size
        if size > 2 and size * 3 // 2 <= most:
            yield size * 3 // 2
        size *= 2


def measures_memory(device: torch.device) -> bool:
    """Return whether it can be told what fits into a device's memory."""
    return device.type == "cuda"


def _fits(model: TaskModel, loader: DataLoader, count: int, config: dict[str, Any], device: torch.device) -> bool:
    """Return whether a step on so many images fits, with what an optimizer keeps of each weight."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    room = _room(device)
    try:
        samples = loader.dataset
        known = min(_SAMPLES, len(samples))
        batch = (loader.collate_fn or default_collate)([samples[0, n % known, n % known] for n in range(count)])
        loss, _ = model.parse_losses(model(*model.data_preprocessor(batch, training=True), mode="loss"))
        loss.backward()
        return _taken(device) + _kept(model, config) <= _SHARE * room
    except torch.OutOfMemoryError:
        return False
    except TaskError:
        raise
    except Exception as error:  # settings meet libraries here, which fail in any way
        raise TaskError(
            f"batch_size=auto: a batch of {count} fails ({type(error).__name__}: {first_line(error)}); look at data.* "
            "and model.*"
        ) from error
    finally:
        loss = batch = None
        model.zero_grad(set_to_none=True)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        _release(device)


def _kept(model: nn.Module, config: dict[str, Any]) -> int:
    """Return the bytes of an optimizer's state, two numbers a weight at most, and of the running average."""
    learned = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    return 2 * learned + (0 if config["ema"] is None else sum(weight.nbytes for weight in model.parameters()))


def _room(device: torch.device) -> int:
    """Return the bytes that this process has or may take, and measure anew."""
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _taken(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
