"""A run's own checkpoint: the config it is rebuilt from, and whether it may be continued."""

import os
from pathlib import Path
from typing import Any

from ...zoo.checkpoint import Checkpoint
from .. import TaskError
from ..checkpoints import keep_copy, rebuilt_from
from .config import DEFAULTS, FREE, leaves, plain
from .loading import fingerprint
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


def check_resumable(checkpoint: dict, config: dict, task, output: Path) -> None:
    last = output / "last.pth"
    if "optimizer" not in checkpoint:
        raise TaskError(f"{last}: holds no state of the optimizer to continue with")
    free = FREE + tuple(task.FREE)
    # What a run of an older version could not yet set, it had at its default.
    before = dict(leaves(plain(DEFAULTS | task.DEFAULTS), free)) | dict(leaves(checkpoint["config"], free))
    now = dict(leaves(plain(config), free))
    for key in now:
        if key in _RESUME_FREE or before.get(key) == now[key]:
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
    meta, processes = checkpoint["meta"], int(os.environ.get("WORLD_SIZE", "1"))
    if meta["processes"] != processes:
        raise TaskError(f"{output}: was begun by {meta['processes']} processes, not {processes}")
    if meta.get("samples", len(task.train_set)) != len(task.train_set):
        raise TaskError(
            f"{output}: was begun with {meta['samples']} training samples, now there are {len(task.train_set)}; the "
            f"data set changed; begin a new run from its weights: model.checkpoint={last}"
        )
    _check_data(
        meta.get("data", {}), task, output, moved=any(_names_data(key) and before.get(key) != now[key] for key in now)
    )


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
