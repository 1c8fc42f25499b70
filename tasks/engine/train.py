"""A run from its config: trained, or measured."""

import contextlib
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook
from torch.torch_version import TorchVersion
from torch.utils.data import DataLoader

from ...zoo.checkpoint import Checkpoint, CheckpointError, load, open_checkpoint
from ...zoo.library_errors import first_line
from .. import TaskError
from ..checkpoints import check_folder, read_checkpoint, remove_partial, taken_as_said
from ..devices import choose_device
from .batch_size import AUTO, FIXED, placeholder, settle
from .config import format_config, task_class_of
from .hooks import Metric, RunHook, SeedHook, TestProgressHook, build_hooks
from .loading import build_loader, usable_cores
from .lock import hold_folder
from .resume import check_resumable, rebuild_config, restore
from .run_folder import RunFolder
from .runner import TaskRunner, TrainLoop
from .schedule import build_schedulers, count_epochs, count_iterations, remark_on_warmup

_MOST_WORKERS = 8


def is_main_process() -> bool:
    """Return whether this process is the one that reports; under torchrun there are others."""
    return int(os.environ.get("RANK", "0")) == 0


def train(config: dict[str, Any], output: str | Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train a model as a config of `load_config` says. Under torchrun, every process calls this.

    Before the first epoch, in seconds, it is checked that the output folder can be written to and has space, and that
    a batch goes forward and backward and a held-out one forward.

    Writes to ``output``: ``config.py`` (complete), ``environment.json``, ``log.txt``, ``history.json`` and
    ``history.csv`` (one entry an epoch), ``last.pth`` (everything a continuation needs), ``best.pth`` (the weights of
    the epoch with the best metric), ``epoch_*.pth`` if asked for, ``curves.png``, and the task's pictures.

    Args:
        config: What to do.
        output: Folder of the run.
        resume: Continue from ``output/last.pth``, to the same result as if there had been no interruption.
        progress: Whether to show it: a bar on a terminal, else lines.

    Returns:
        ``metrics`` of the best epoch, by ``metric``, ``history``, the paths ``best`` and ``last``, and ``pictures``, a
        list of ``(file name, what it shows)``.

    Raises:
        TaskError: If the run can't be done, ``output`` holds another run or can't be written to, or the loss ceases to
            be a number.
        CheckpointError: If there is no checkpoint to continue from, or one can't be read or doesn't fit.
    """
    output = Path(output)
    if config["compile"]:
        _check_guards()
    _check_begun(output / "last.pth", resume)
    if not is_main_process():
        return _train(config, output, resume, progress, [])
    with _own_folder(output) as remark:
        return _train(config, output, resume, progress, [remark] if remark else [])


@contextlib.contextmanager
def _own_folder(output: Path) -> Iterator[str | None]:
    """Make the run's folder and keep other runs out; what a killed one began to write goes, an empty folder too."""
    new = not output.exists()
    check_folder(output, needed=0)
    try:
        with hold_folder(output) as remark:
            remove_partial(output)
            yield remark
    finally:
        if new:
            with contextlib.suppress(OSError):
                output.rmdir()


def _train(config: dict[str, Any], output: Path, resume: bool, progress: bool, remarks: list[str]) -> dict[str, Any]:
    last = output / "last.pth"
    _check_begun(last, resume)  # again, now that no other run can begin here
    checkpoint = read_checkpoint(last, config["task"], merged=False) if resume else None
    device, distributed = _launch(config["device"])
    config, task, more = _settled(config, checkpoint, last, device)
    loader = _loader(task.train_set, config, device, seed=config["seed"])
    val_loader = _loader(task.val_set, config, device, seed=None)
    epochs = count_epochs(config, len(loader))
    remarks += more + remark_on_warmup(config, epochs, len(loader))
    metric = Metric(task, val_loader.dataset)
    history: list[dict[str, Any]] = []
    if checkpoint is not None:
        with taken_as_said(last):
            remarks += check_resumable(checkpoint, config, task, output)
            history = checkpoint["history"]
            if is_main_process():
                restore(output, checkpoint, config["checkpoint"]["keep"])
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # The schedule counts batches, and with accumulation the first step comes later.
        warnings.filterwarnings("ignore", "Detected call of `scheduler.step")
        warnings.filterwarnings("ignore", "Setting (OMP|MKL)_NUM_THREADS")
        runner = TaskRunner(
            task,
            config,
            device,
            scratch,
            distributed,
            train_dataloader=loader,
            train_cfg=_loop(config, epochs, len(loader)),
            optim_wrapper={"type": "OptimWrapper"},
            param_scheduler=build_schedulers(config, epochs, len(loader)),
            val_dataloader=val_loader,
            val_cfg={},
            val_evaluator=Evaluator([metric]),
            custom_hooks=[
                SeedHook(config["seed"]),
                run_hook := RunHook(task, config, history, metric, progress),
                *([_average(config)] if config["ema"] is not None else []),
                *build_hooks(config["custom_hooks"]),
            ],
            load_from=str(last) if resume else None,
            resume=resume,
        )
        if runner.rank == 0:
            check_folder(output, runner.estimate_space())
            run_hook.folder = RunFolder(output, config, device, speak=progress)
            run_hook.introduce(runner, resume, remarks)
        run_hook.output = output
        _without_worker_traceback(runner.train)
        _without_worker_traceback(lambda: run_hook.make_up(runner))
        pictures = run_hook.finish() if runner.rank == 0 else []
    _leave(distributed)
    return {
        "metrics": _best_metrics(history, task.metric),
        "metric": task.metric,
        "history": history,
        "best": output / "best.pth",
        "last": last,
        "pictures": pictures,
    }


def _build_task(config: dict, checkpoint: dict | None, path: str | Path | Checkpoint):
    """Return a config's task; its model is a checkpoint's, if there is one."""
    build = task_class_of(config["task"])
    if checkpoint is None:
        return build(config)
    with taken_as_said(path):
        return build(rebuild_config(config, checkpoint, path))


def _settled(config: dict, checkpoint: dict | None, path: Path, device: torch.device) -> tuple[dict, Any, list[str]]:
    """Return a config whose batch size is a number, its task, and what there is to say of its data."""
    trial = placeholder(config)
    task = _build_task(trial, checkpoint, path)
    remarks = task.check_data()
    if config["batch_size"] != AUTO:
        return config, task, remarks
    size, remark = settle(trial, task, _loader(task.train_set, trial, device, seed=0), device, checkpoint)
    config = config | {"batch_size": size}
    # What a task makes of a batch's size, it makes of this one.
    return config, _build_task(config, checkpoint, path), [*remarks, remark]


def _loop(config: dict, epochs: int, batches: int) -> dict[str, Any]:
    """Return the loop that trains, as mmengine asks for it."""
    iterations = count_iterations(config, epochs, batches)
    return {"type": TrainLoop, "max_epochs": epochs, "val_interval": config["val_interval"], "iterations": iterations}


def _average(config: dict) -> EMAHook:
    """Return the hook that keeps the running average of the weights."""
    if config["ema_warmup"] is None:
        return EMAHook(momentum=config["ema"])
    return EMAHook("MomentumAnnealingEMA", momentum=config["ema"], gamma=config["ema_warmup"])


def _check_begun(last: Path, resume: bool) -> None:
    """Raise unless there is a run to continue, or none where one is to begin."""
    try:
        exists = last.exists()
    except (OSError, ValueError) as error:
        raise TaskError(f"{last.parent}: is no name of a folder ({first_line(error)}); choose another") from error
    if exists and not resume:
        raise TaskError(f"{last.parent}: already holds a run; continue it with --resume, or choose another --output")
    if resume and not exists:
        raise CheckpointError(f"{last}: no such file, so there is nothing to continue; begin without --resume")


def _best_metrics(history: list[dict[str, Any]], metric: str) -> dict[str, float]:
    best = max(history, key=lambda entry: entry.get(f"val/{metric}", -math.inf))
    return {key.removeprefix("val/"): value for key, value in best.items() if key.startswith("val/")}


def evaluate(
    config: dict[str, Any],
    checkpoint_path: str | Path | None = None,
    progress: bool = True,
    report: str | Path | None = None,
) -> tuple[dict[str, float], list, list]:
    """Measure a model on the validation set of a config.

    Args:
        config: What to measure on, and how.
        checkpoint_path: Checkpoint of `train`; None for the weights that the config starts from.
        progress: Whether to show it on a terminal.
        report: Folder for pictures, and the report that holds them; None for none.

    Returns:
        The metrics, and for every image, in the order of the set, the task's prediction and the target; without
        damaged images, if they are to be skipped.

    Raises:
        TaskError: If the evaluation can't be done.
        CheckpointError: If the checkpoint can't be read or doesn't hold the config's model.
    """
    opened = None if checkpoint_path is None else open_checkpoint(checkpoint_path)
    checkpoint = None if opened is None else read_checkpoint(opened, config["task"])
    # What is measured is whole.
    config = config | {"freeze": (), "lora": {**config["lora"], "rank": None}}
    if config["batch_size"] == AUTO:
        config["batch_size"] = FIXED
    device, distributed = _launch(config["device"])
    task = _build_task(config, checkpoint, opened)
    if checkpoint is not None:
        _check_card(checkpoint["card"], task.card(), checkpoint_path)
    for remark in task.check_data(training=False):
        if is_main_process():
            warnings.warn(remark, stacklevel=2)
    loader = _loader(task.val_set, config, device, seed=None)
    metric = Metric(task, loader.dataset)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting (OMP|MKL)_NUM_THREADS")
        runner = TaskRunner(
            task,
            config,
            device,
            scratch,
            distributed,
            test_dataloader=loader,
            test_cfg={},
            test_evaluator=Evaluator([metric]),
            custom_hooks=[TestProgressHook()] if progress else [],
        )
        if checkpoint is not None:
            load(runner.net, checkpoint["state_dict"], checkpoint_path)
        measured = _without_worker_traceback(runner.test)
    metrics = {key.removeprefix("val/"): value for key, value in measured.items()}
    if report is not None and is_main_process():
        epoch = 0 if checkpoint is None else checkpoint["card"].get("epoch", 0)
        facts = {"checkpoint": str(checkpoint_path or "the weights that the config starts from"), "epoch": epoch}
        _report(task, config, metrics, metric, Path(report), facts)
    _leave(distributed)
    return metrics, *metric.collected


def _report(task, config: dict, metrics: dict, metric: Metric, folder: Path, facts: dict[str, Any]) -> None:
    """Write what an evaluation found, with pictures, into a folder."""
    from ..pictures.report import write_report

    check_folder(folder, needed=0)
    predictions, targets = metric.collected
    pictures = task.draw(predictions, targets, folder, facts["epoch"], metric.indices)
    facts |= {"images": len(targets)}
    rows = task.measure_classes(predictions, targets)
    write_report(folder / "report.html", "Evaluation", facts, metrics, rows, pictures, format_config(config))


def _check_card(card: dict, expected: dict, path: str | Path) -> None:
    """Raise a TaskError unless a checkpoint is of the model and the classes that are expected."""
    for key in ("model", "classes"):
        if card.get(key) != expected[key]:
            raise TaskError(f"{path}: its {key} is {card.get(key)}, but the config's is {expected[key]}")


def _check_guards() -> None:
    """Refuse to compile where a model that goes into evaluation would go on as in training, and say nothing."""
    # CPython 3.13.0 tells torch's guards of attributes that are no longer so (python/cpython#125608).
    if sys.version_info[:3] == (3, 13, 0) and TorchVersion(torch.__version__) < (2, 12):
        raise TaskError(
            f"compile=True: torch {torch.__version__} on Python 3.13.0 would validate the model as in training; take "
            "another Python, such as 3.13.1, torch 2.12 or newer, or compile=False"
        )


def _launch(device_name: str) -> tuple[torch.device, bool]:
    """Return the device of this process, and whether torchrun started several, after joining them."""
    device = choose_device(device_name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, False
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        # mmengine's own launch calls CUDA even where there is none.
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, True


def _leave(distributed: bool) -> None:
    """Wait for the other processes, so that what one of them wrote is there, and part from them."""
    if distributed:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _without_worker_traceback(run):
    """Call ``run``; a `TaskError` from a process that loads data comes wrapped in its traceback, of which none is."""
    try:
        return run()
    except TaskError as error:
        last = str(error).strip().splitlines()[-1]
        raise TaskError(re.sub(r"^[\w.]+Error: ", "", last)) from error


def _loader(dataset, config: dict, device: torch.device, seed: int | None) -> DataLoader:
    """Return this process's loader, for training with ``seed``, for evaluation without."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    workers = config["workers"]
    if workers is None:
        # One core for the process itself, of those that it may use.
        workers = min(_MOST_WORKERS, max(0, usable_cores() // processes - 1))
    return build_loader(
        dataset,
        config["batch_size"],
        workers,
        seed,
        rank=int(os.environ.get("RANK", "0")),
        processes=processes,
        skip_damaged=config["damaged_images"] == "skip",
        pin_memory=device.type == "cuda",
    )
