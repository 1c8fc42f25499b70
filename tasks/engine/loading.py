"""Loading samples so that a run can be repeated, and continued from any batch.

What a sample draws at random depends on the seed, the epoch and its place in the epoch alone: not on which process
loads it, nor on what was loaded before.
"""

import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import TaskError
from ..data.images import DamagedImageError


def derive_seed(*numbers: int) -> int:
    """Return a seed that is well mixed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# Of so many files, spread evenly, the length is compared: to ask for all takes minutes on a slow disk.
_MEASURED = 1000


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Return, in plain types, what stays the same when a data set moves: count, names with labels, lengths of files.

    Names are those below the folder that all files lie in. Of bundled data there are none.
    """
    entries = dataset.inventory()
    files = [os.path.abspath(file) for file, _ in entries]
    common = os.path.commonpath(map(os.path.dirname, files)) if files else ""
    names, lengths = hashlib.sha256(), hashlib.sha256()
    for file, (_, label) in zip(files, entries, strict=True):
        names.update(f"{os.path.relpath(file, common)}\0{label}\n".encode(errors="surrogateescape"))
    for index in np.unique(np.linspace(0, len(files) - 1, _MEASURED).astype(int)) if files else ():
        lengths.update(b"%d\n" % (os.path.getsize(files[index]) if os.path.isfile(files[index]) else -1))
    return {"count": len(files), "names": names.hexdigest(), "lengths": lengths.hexdigest()}


class Order(Sampler):
    """The order of an epoch's samples, of which each process gets every ``processes``-th.

    The last samples are filled up with the first, so that all processes have equally many.

    Attributes:
        epoch: Decides the order.
        start: How many samples of this process have been had already.

    Args:
        size: Samples of the data set.
        seed: Of the shuffling, and of what samples draw; None for the data set's order.
        rank: Number of this process.
        processes: How many there are.
        weights: ``[size]``, how likely each sample is to be drawn, again and again; each is had once if None.
    """

    def __init__(
        self, size: int, seed: int | None, rank: int = 0, processes: int = 1, weights: torch.Tensor | None = None
    ):
        self.size, self.seed, self.rank, self.processes = size, seed, rank, processes
        self.weights = weights
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return -(-self.size // self.processes)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield epoch, place and index of every sample."""
        if self.seed is None:
            order = range(self.size)
        else:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
            if self.weights is None:
                order = torch.randperm(self.size, generator=generator).tolist()
            else:
                order = torch.multinomial(self.weights, self.size, replacement=True, generator=generator).tolist()
        for place in range(self.rank + self.start * self.processes, len(self) * self.processes, self.processes):
            yield self.epoch, place, order[place % self.size]


class Samples(Dataset):
    """A data set whose samples are asked for by what `Order` yields.

    Attributes:
        damaged: For every sample whether its image was found damaged, shared with the processes that load.

    Args:
        dataset: What is loaded.
        seed: Of what samples draw; None leaves the generators alone.
        skip_damaged: Whether the next sample takes the place of one that can't be read.
    """

    def __init__(self, dataset: Dataset, seed: int | None, skip_damaged: bool = False):
        self.dataset, self.seed, self.skip_damaged = dataset, seed, skip_damaged
        self.damaged = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int, int]) -> Any:
        epoch, place, index = draw
        if self.seed is not None:
            seed = derive_seed(self.seed, epoch, place)
            random.seed(seed)
            np.random.seed(seed)
            # torch.manual_seed would also seed every accelerator, for each sample.
            torch.default_generator.manual_seed(seed)
        for step in range(len(self)):
            number = (index + step) % len(self)
            if self.damaged[number]:
                continue
            try:
                return self.dataset[number]
            except DamagedImageError as error:
                if not self.skip_damaged:
                    raise DamagedImageError(f"{error}; damaged_images=skip leaves such images out") from error
                self.damaged[number] = True
        raise TaskError("every image of the data set is damaged")

    def describe_damaged(self) -> list[str]:
        """Return, for every sample that was found damaged, what is wrong with it."""
        messages = []
        for index in self.damaged.nonzero().flatten().tolist():
            try:
                self.dataset[index]
                messages.append(f"sample {index}: could not be read at first")
            except DamagedImageError as error:
                messages.append(str(error))
        return messages


def share_damaged(samples: Samples) -> None:
    """Let every process know which samples any of them found damaged."""
    if not torch.distributed.is_initialized():
        return
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    flags = samples.damaged.int().to(device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    samples.damaged.copy_(flags.bool())


def count_batches(samples: int, batch_size: int, processes: int) -> int:
    """Return how many batches a process has in an epoch of training."""
    own = -(-samples // processes)
    return own // batch_size if drops_last(samples, batch_size, processes) else -(-own // batch_size)


def drops_last(samples: int, batch_size: int, processes: int) -> bool:
    """Return whether a last batch that isn't whole is left out of training: it is where there are others."""
    return samples >= batch_size * processes


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fitting_workers(workers: int) -> int:
    """Return how many processes load where so many are asked for: no more than this one may use cores."""
    return min(workers, usable_cores())


def build_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int = 0,
    seed: int | None = None,
    rank: int = 0,
    processes: int = 1,
    skip_damaged: bool = False,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of batches, made of samples by ``dataset.collate`` if that isn't None.

    Args:
        dataset: Samples.
        batch_size: Of each process.
        workers: Processes that load, for each process that trains; as many as this machine has cores at most, since
            what is loaded doesn't depend on their number.
        seed: Of order and augmentation, for training; None for evaluation. Training leaves out an incomplete batch,
            unless it is the only one.
        rank: Number of this process.
        processes: How many there are.
        skip_damaged: Whether the next sample takes the place of one that can't be read.
        pin_memory: Whether batches lie in memory that accelerators copy from fast.
    """
    workers = fitting_workers(workers)
    return DataLoader(
        Samples(dataset, seed, skip_damaged),
        batch_size,
        sampler=Order(
            len(dataset), seed, rank, processes, getattr(dataset, "weights", None) if seed is not None else None
        ),
        num_workers=workers,
        drop_last=seed is not None and drops_last(len(dataset), batch_size, processes),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        collate_fn=dataset.collate,
    )
