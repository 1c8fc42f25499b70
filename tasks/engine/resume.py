"""A run's own checkpoint: the config it is rebuilt from, and whether it may be continued."""

import os
from pathlib import Path
from typing import Any

from ...zoo.checkpoint import Checkpoint
from .. import TaskError
from ..checkpoints import keep_copy, rebuilt_from
from .config import DEFAULTS, FREE, leaves, plain
from .loading import count_batches, fingerprint
from .run_folder import write_history

# What may differ between a run and its continuation.
_RESUME_FREE = ("device", "workers", "log", "checkpoint.interval", "checkpoint.keep")


def rebuild_config(config: dict, checkpoint: dict, path: str | Path | Checkpoint) -> dict:
    """Return a config whose model is built from a checkpoint of the run, and images are read as the run did."""
    white = checkpoint["card"]["white"]
    if config["data"]["white"] not in (None, white):
        raise TaskError(
            f"{path}: was trained with data.white={white}, not {config['data']['white']}; leave data.white out"
        )
    if checkpoint["card"].get("lora"):
        # It holds adapters, of weights that the run starts from again.
        return config | {"data": config["data"] | {"white": white}}
    return config | {"model": rebuilt_from(config["model"], path), "data": config["data"] | {"white": white}}


def check_resumable(checkpoint: dict, config: dict, task, output: Path) -> list[str]:
    """Return what is to be said of going on from a checkpoint.

    As many processes as before go on to the same bits; others to the same samples, batch by batch.

    Raises:
        TaskError: If the settings, the data or the batches are others.
    """
    last = output / "last.pth"
    if "optimizer" not in checkpoint:
        raise TaskError(f"{last}: holds no state of the optimizer to continue with")
    free = FREE + tuple(task.FREE)
    # What a run of an older version could not yet set, it had at its default.
    before = dict(leaves(plain(DEFAULTS | task.DEFAULTS), free)) | dict(leaves(checkpoint["config"], free))
    now = dict(leaves(plain(config), free))
    meta, processes = checkpoint["meta"], int(os.environ.get("WORLD_SIZE", "1"))
    lines = _check_processes(meta["processes"], processes, before["batch_size"], config, task, output)
    for key in now:
        if key in _RESUME_FREE or before.get(key) == now[key] or (lines and key == "batch_size"):
            continue
        if _names_data(key) and "data" in checkpoint["meta"]:
            # Where it lies is free; what it is, is compared below.
            continue
        reason = ""
        if key in ("epochs", "iterations"):
            if config["schedule"]["name"] == "step":
                # Steps are where they are, however long the run goes on.
                continue
            reason = " (its learning rate has been scheduled for that; only schedule.name=step can be extended)"
        raise TaskError(
            f"{output}: was begun with {key}={before.get(key)!r}{reason}, not {now[key]!r}; resume with the same "
            f"settings, or begin a new run from its weights: model.checkpoint={last}"
        )
    if checkpoint["card"]["classes"] != task.card()["classes"]:
        raise TaskError(f"{output}: was begun with the classes {checkpoint['card']['classes']}; the data set changed")
    if meta.get("samples", len(task.train_set)) != len(task.train_set):
        raise TaskError(
            f"{output}: was begun with {meta['samples']} training samples, now there are {len(task.train_set)}; the "
            f"data set changed; begin a new run from its weights: model.checkpoint={last}"
        )
    _check_data(
        meta.get("data", {}), task, output, moved=any(_names_data(key) and before.get(key) != now[key] for key in now)
    )
    return lines


def _check_processes(then: int, now: int, batch: int, config: dict, task, output: Path) -> list[str]:
    """Return a line if other processes go on, each step with the samples that it would have had.

    Raises:
        TaskError: If steps would have other samples.
    """
    if then == now:
        return []
    whole, samples = then * batch, len(task.train_set)
    if config["batch_size"] * now != whole:
        cure = f"batch_size={whole // now}" if whole % now == 0 else f"a number of processes that divides {whole}"
        raise TaskError(
            f"{output}: was begun by {then} processes with batch_size={batch}, {whole} images a step; {now} go on with "
            f"as many: {cure}"
        )
    if count_batches(samples, batch, then) != count_batches(samples, config["batch_size"], now):
        raise TaskError(
            f"{output}: was begun by {then} processes; {now} would have another number of steps an epoch of {samples} "
            "samples"
        )
    return [f"was begun by {then} processes; {now} go on with the same samples, but not to the same bits"]


def restore(output: Path, checkpoint: dict, keep: int) -> None:
    """Make again what a run that was killed right after its last checkpoint still had to write."""
    history = checkpoint["history"]
    if not history:
        return
    write_history(output, history)
    epoch_file = output / f"epoch_{history[-1]['epoch']:04d}.pth"
    if keep and checkpoint["begun"] is None and not epoch_file.exists():
        keep_copy(output / "last.pth", epoch_file)


def _names_data(key: str) -> bool:
    """Return whether a key says where data lies."""
    return key == "data.root" or ".".join(key.split(".")[:2]) in ("data.train", "data.val")


def _check_data(before: dict[str, dict[str, Any]], task, output: Path, moved: bool) -> None:
    """Raise a TaskError unless the data is what a run was begun with, wherever it lies now.

    Where it hasn't moved, a file may have another length: a damaged one may have been mended.
    """
    for split, dataset in (("train", task.train_set), ("val", task.val_set)):
        now = fingerprint(dataset)
        for key, what in (("count", "files"), ("names", "names or labels"), ("lengths", "lengths of the files")):
            then = before.get(split, now)[key]
            if then != now[key] and (moved or key != "lengths"):
                numbers = f" ({then} then, {now[key]} now)" if key == "count" else ""
                raise TaskError(
                    f"{output}: was begun with other {split} data: its {what} differ{numbers}; the data set changed; "
                    f"name the folder it was begun with by data.root, or begin a new run from its weights: "
                    f"model.checkpoint={output / 'last.pth'}"
                )
