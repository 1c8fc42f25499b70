"""What happens beside training: seeds, measurements, progress, the history, and when checkpoints are written."""

import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast_object_list
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch._inductor import config as inductor
from tqdm import tqdm

from ...zoo.library_errors import call_fault
from .. import TaskError, nearest
from ..checkpoints import keep_copy
from ..data.images import FULL_WHITE
from .config import format_config, plain
from .loading import Samples, derive_seed, share_damaged
from .run_folder import RunFolder
from .runner import TaskRunner
from .schedule import learning_rate

# So many classes are named at the beginning of a run.
_NAMED = 20


class Metric(BaseMetric):
    """Gathers predictions and targets from all processes, each sample's once, for the task's ``measure``."""

    def __init__(self, task, samples: Samples):
        super().__init__(collect_device="gpu", prefix="val")
        self._task, self._samples = task, samples
        self.collected: tuple[list, list] = ([], [])
        self.indices: list[int] = []

    def process(self, data_batch: Sequence, data_samples: Sequence) -> None:
        """Keep a batch's predictions, on the CPU, with its targets."""
        targets = data_batch[1]
        self.results.extend((_cpu(sample), _cpu(target)) for sample, target in zip(data_samples, targets, strict=True))

    def evaluate(self, size: int) -> dict:
        """Learn which samples other processes found damaged, and measure.

        Raises:
            TaskError: If what is left of the set has nothing to measure the task's ``metric`` by.
        """
        share_damaged(self._samples)
        metrics = super().evaluate(size)
        if f"{self.prefix}/{self._task.metric}" not in metrics:
            raise TaskError(
                f"{self._task.metric} can't be measured: of {len(self._samples)} held-out images "
                f"{int(self._samples.damaged.sum())} can't be read, and the others hold nothing to measure it by"
            )
        return metrics

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Return the task's metrics; another sample stood in for each that is damaged, and doesn't count."""
        self.indices = (~self._samples.damaged).nonzero().flatten().tolist()
        predictions, targets = (list(column) for column in zip(*(results[i] for i in self.indices), strict=True))
        self.collected = (predictions, targets)
        return self._task.measure(predictions, targets)


def _cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _cpu(item) for key, item in value.items()}
    return value


class SeedHook(Hook):
    """Seeds every batch by its number: a continued run then draws what an uninterrupted one would."""

    priority = "VERY_HIGH"

    def __init__(self, seed: int):
        self._seed = seed

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Seed."""
        seed = derive_seed(self._seed, runner.iter, runner.rank, 1)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


class RunHook(Hook):
    """Reports progress, keeps the history and writes the checkpoints, after everything else that is done.

    Attributes:
        output: Folder of the run.
        folder: What writes there, in the main process.
    """

    priority = "VERY_LOW"

    def __init__(self, task, config: dict, history: list[dict], metric: Metric, progress: bool):
        self._task, self._config = task, config
        self._history = history
        self._metric = metric
        self._progress = progress
        self._bar = None
        self._shown: tuple[int, list, list, list[int]] | None = None
        self._measured = self._again = False  # whether an epoch has ended here; whether the last is measured once more
        self._batch: Any = None
        self.output = Path()
        self.folder: RunFolder | None = None

    def introduce(self, runner: TaskRunner, resume: bool, remarks: Sequence[str] = ()) -> None:
        """Say what is about to be done, and what was remarked about the data."""
        environment = self.folder.environment
        self.folder.say(
            f"{len(self._task.train_set)} training and {len(self._task.val_set)} held-out samples, "
            f"{len(self._task.classes)} classes; {runner.tried}; {environment['device']}, "
            f"{environment['processes']} process{'es' if environment['processes'] > 1 else ''}"
        )
        classes = list(self._task.classes)
        self.folder.say(f"classes: {', '.join(classes[:_NAMED])}{', ...' if len(classes) > _NAMED else ''}")
        for remark in remarks:
            self.folder.say(remark)
        if (white := self._task.train_set.white) != FULL_WHITE:
            self.folder.say(f"pixels of 16 bits: {white} is white, 255 (data.white)")
        if (rate := learning_rate(self._config)) != self._config["optimizer"]["lr"]:
            self.folder.say(f"learning rate {rate:g}, by optimizer.lr_batch")
        if resume:
            self.folder.say("continued")

    def before_train(self, runner: Runner) -> None:
        """Note the time, and show a bar on a terminal."""
        if self._config["compile"]:
            # After the EMA's copy, which stays as it is.
            # Where images differ in size, inductor can't order open strides of views that a step keeps (torch 2.14).
            options = {"strict_output_strides": True} if hasattr(inductor, "strict_output_strides") else None
            getattr(runner.net, "backbone", runner.net).compile(options=options)
        self._stop_early(runner)
        self._speak = self._progress and runner.rank == 0
        self._began, self._from_iter = time.monotonic(), runner.iter
        # After so many batches the last checkpoint was written, of which this one continues.
        self._good = runner.iter
        if self._speak and sys.stderr.isatty():
            self._bar = tqdm(
                total=runner.max_iters, initial=runner.iter, unit="batch", dynamic_ncols=True, desc="training"
            )

    def before_train_epoch(self, runner: TaskRunner) -> None:
        """Begin an epoch's measurements, or go on with those of one that was interrupted."""
        begun, runner.begun = runner.begun or {"seconds": 0.0, "losses": {}}, None
        self._losses: dict[str, list[Tensor]] = {
            name: list(values.to(next(runner.net.parameters()).device)) for name, values in begun["losses"].items()
        }
        self._checked = len(self._losses.get("loss", ()))
        self._epoch_began = time.monotonic() - begun["seconds"]
        self._parts = {"data": 0.0, "held out": 0.0, "writing": 0.0} | begun.get("parts", {})
        self._last_line = self._idle_since = time.monotonic()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Note how long the batch was waited for."""
        self._parts["data"] += time.monotonic() - self._idle_since

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Note the losses; write a checkpoint where one is due."""
        for name, value in outputs.items():
            self._losses.setdefault(name, []).append(value.detach().float())
        batches = len(runner.train_dataloader)
        if self._bar is not None:
            self._bar.update()
        elif self.folder is not None and time.monotonic() - self._last_line > 60:
            # Long epochs without a terminal still show that they move.
            self._last_line = time.monotonic()
            self.folder.say(f"epoch {runner.epoch + 1}, batch {batch_idx + 1}/{batches}, {self._left(runner)} left")
        if len(self._losses["loss"]) - self._checked >= 100:
            self._check_finite(runner)
        self._batch = data_batch
        interval = self._config["checkpoint"]["interval"]
        if interval is not None and (runner.iter + 1) % interval == 0 and batch_idx + 1 < batches:
            self._check_finite(runner, again=True)
            self._average_losses(runner)
            begun = {
                "seconds": time.monotonic() - self._epoch_began,
                "parts": self._parts,
                "losses": {name: torch.stack(values).cpu() for name, values in self._losses.items()},
            }
            share_damaged(runner.train_dataloader.dataset)
            self._save(runner, runner.iter + 1, begun)
        self._idle_since = time.monotonic()

    def after_train_epoch(self, runner: TaskRunner) -> None:
        """Average the losses; without a validation to come, complete the epoch."""
        self._check_finite(runner, again=True)
        runner.average_statistics()
        self._average_losses(runner)
        epoch = runner.epoch + 1
        means = {name: float(torch.stack(values).mean()) for name, values in self._losses.items()}
        self._entry = {
            "epoch": epoch,
            "lr": max(group["lr"] for group in runner.optim_wrapper.param_groups),
            "train/loss": means.pop("loss"),
            **{f"train/{name}": value for name, value in means.items()},
        }
        if epoch % self._config["val_interval"] and epoch != runner.max_epochs:
            self._end_epoch(runner, {})
        self._idle_since = time.monotonic()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Complete the epoch, if one was trained for."""
        if self._again:
            return
        self._parts["held out"] = time.monotonic() - self._idle_since
        self._end_epoch(runner, metrics or {})
        self._stop_early(runner)

    def make_up(self, runner: TaskRunner) -> None:
        """Measure the last epoch again if the run was killed between its last checkpoint and its report."""
        lacking = [not self._measured and not (self.output / "report.html").exists()]
        broadcast_object_list(lacking)  # what the main process sees
        if not lacking[0]:
            return
        if self.folder is not None:
            self.folder.say("ended without a report: what is held out is measured again")
        self._again = True
        runner.val_loop.run()

    def after_train(self, runner: Runner) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _end_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        key, self._measured = f"val/{self._task.metric}", True
        best = max((entry[key] for entry in self._history if key in entry), default=-math.inf)
        entry = self._entry | metrics
        if self._config["damaged_images"] == "skip":
            entry |= self._count_damaged(runner, bool(metrics))
        entry["seconds"] = round(time.monotonic() - self._epoch_began, 2)
        self._history.append(plain(entry))
        done = min(entry["epoch"] * len(runner.train_dataloader), runner.max_iters)
        if self.folder is not None:
            self.folder.check()
        if metrics.get(key, -math.inf) > best:
            self._shown = (entry["epoch"], *self._metric.collected, self._metric.indices)
            self._write(runner, "best.pth", done, complete=False)
        self._save(runner, done)
        if self.folder is None:
            return
        self._keep(entry["epoch"])
        self.folder.write_scalars(self._history)
        measured = {name.removeprefix("val/"): value for name, value in metrics.items()}
        measured = "".join(f"  {name} {value:.4f}" for name, value in measured.items() if name in self._task.shown)
        self.folder.say(
            f"epoch {entry['epoch']:>3}/{runner.max_epochs}  train loss {entry['train/loss']:.4f}"
            f"{'  held out:' if measured else ''}{measured}  {self._spent()}, {self._left(runner)} left"
        )

    def _spent(self) -> str:
        """Say how long the epoch took, and what of it went where."""
        total = time.monotonic() - self._epoch_began
        parts = {"steps": total - sum(self._parts.values()), **self._parts}
        return f"{total:.1f} s ({', '.join(f'{name} {seconds:.1f}' for name, seconds in parts.items())})"

    def _stop_early(self, runner: Runner) -> None:
        """End the run if its metric has not become better for as many epochs as the config allows.

        By the history, which a checkpoint holds, so that a continued run ends where it would have.
        """
        key, patience = f"val/{self._task.metric}", self._config["early_stop"]
        measured = [(entry[key], -entry["epoch"]) for entry in self._history if key in entry]
        if patience is None or not measured or self._history[-1]["epoch"] + max(measured)[1] < patience:
            return
        runner.train_loop.stop_training = True
        if self.folder is not None:
            best = -max(measured)[1]
            self.folder.say(f"ends early: {self._task.metric} was best in epoch {best} (early_stop={patience})")

    def _save(self, runner: TaskRunner, iteration: int, begun: dict | None = None) -> None:
        """Write what a continuation needs after ``iteration`` batches."""
        if self.folder is not None:
            self.folder.check()
        self._write(runner, "last.pth", iteration, begun)
        self._good = iteration

    def _write(self, runner: TaskRunner, name: str, iteration: int, begun: dict | None = None, **options: bool) -> None:
        since = time.monotonic()
        runner.save_checkpoint(self.output / name, self._history, iteration, begun, **options)
        self._parts["writing"] += time.monotonic() - since

    def _average_losses(self, runner: Runner) -> None:
        """Let all processes have the mean of their losses."""
        if runner.distributed:
            for name, values in self._losses.items():
                means = torch.stack(values)
                torch.distributed.all_reduce(means)
                self._losses[name] = list(means / runner.world_size)

    def _count_damaged(self, runner: Runner, measured: bool) -> dict[str, int]:
        """Return how many images were skipped so far; those that weren't known before are named."""
        share_damaged(runner.train_dataloader.dataset)
        counts = {}
        for name, loader in (("train", runner.train_dataloader), ("val", runner.val_dataloader)):
            if name == "val" and not measured:
                continue
            key = f"{name}/damaged"
            counts[key] = int(loader.dataset.damaged.sum())
            before = max((entry.get(key, 0) for entry in self._history), default=0)
            if self.folder is not None and counts[key] > before:
                messages = loader.dataset.describe_damaged()
                self.folder.say(
                    f"skipped {counts[key]} damaged: {'; '.join(messages[:5])}{' ...' * (len(messages) > 5)}"
                )
        return counts

    def _keep(self, epoch: int) -> None:
        """Keep the checkpoint of this epoch under its number, and remove those that are too old."""
        keep = self._config["checkpoint"]["keep"]
        if keep:
            keep_copy(self.output / "last.pth", self.output / f"epoch_{epoch:04d}.pth")
        for file in sorted(self.output.glob("epoch_[0-9]*.pth"))[: -keep or None]:
            file.unlink()

    def finish(self) -> list[tuple[str, str]]:
        """Draw the curves, and let the task draw what it predicted in the best epoch.

        A continued run that had its best epoch before shows the last one, and one that was complete and has a report
        draws nothing new.
        """
        from ..pictures.figures import draw_curve
        from ..pictures.report import write_report

        draw_curve(self._history, self._task.metric, self.output / "curves.png")
        pictures = [("curves.png", "loss and metric over the epochs")]
        collected = (self._history[-1]["epoch"], *self._metric.collected, self._metric.indices)
        epoch, predictions, targets, indices = self._shown or collected
        if targets:
            pictures += self._task.draw(predictions, targets, self.output, epoch, indices)
            measured = next(entry for entry in self._history if entry["epoch"] == epoch)
            metrics = {key.removeprefix("val/"): value for key, value in measured.items() if key.startswith("val/")}
            environment = self.folder.environment
            facts = {key: environment[key] for key in ("begun", "device", "processes", "again")}
            facts |= {"epochs": f"{len(self._history)}; measured after {epoch}", "by": _revision(environment)}
            rows = self._task.measure_classes(predictions, targets)
            settings = format_config(self._config)
            write_report(self.output / "report.html", str(self.output), facts, metrics, rows, pictures, settings)
        self.folder.say(f"complete; the same again: {self.folder.environment['again']}")
        self.folder.close()
        return pictures

    def _left(self, runner: Runner) -> timedelta:
        done = max(1, runner.iter - self._from_iter)
        seconds = (time.monotonic() - self._began) / done * (runner.max_iters - runner.iter)
        return timedelta(seconds=round(seconds))

    def _check_finite(self, runner: TaskRunner, again: bool = False) -> None:
        """Raise a TaskError unless the losses since the last call, and the weights that they led to, are numbers.

        Args:
            runner: What trains.
            again: Whether the last batch must have a loss once more, after the step: else the checkpoint that is due
                could never be continued from.
        """
        losses, self._checked = self._losses["loss"][self._checked :], len(self._losses["loss"])
        if losses and not torch.isfinite(torch.stack(losses)).all():
            what = "the loss ceased to be a number"
        elif not _has_finite_weights(runner.net):
            what = "the weights ceased to be finite"
        elif again and self._batch is not None and not runner.has_loss(self._batch):
            what = "after the last step the loss is no number"
        else:
            return
        if self._bar is not None:
            self._bar.close()
        last = self.output / "last.pth"
        good = (
            f"the last good checkpoint is {last}, after {self._good} batches"
            if self._good
            else "no checkpoint was written yet"
        )
        raise TaskError(
            f"{what} in epoch {runner.epoch + 1}; lower optimizer.lr (now "
            f"{self._config['optimizer']['lr']}), set optimizer.clip_grad=1.0, or use precision=float32; {good}"
        )


def _revision(environment: Mapping[str, Any]) -> str:
    """Return what the run was done by: the version, and of a checkout the commit."""
    revision = environment["revision"]
    commit = "" if revision is None else f", commit {revision['commit'][:12]}{', changed' * revision['changed']}"
    return f"foveate {environment['packages']['foveate']}, torch {environment['packages']['torch']}{commit}"


def _has_finite_weights(net: nn.Module) -> bool:
    """Return whether a model's parameters and statistics are finite, and of norms that are: beyond, no loss is."""
    statistics = (value for name, value in net.named_buffers() if name.endswith(("running_mean", "running_var")))
    norms = [value.detach().float().norm() for value in (*net.parameters(), *statistics)]
    return not norms or bool(torch.isfinite(torch.stack(norms)).all())


class TestProgressHook(Hook):
    """A bar over the batches of an evaluation, on a terminal."""

    def before_test_epoch(self, runner: Runner) -> None:
        """Show the bar."""
        silent = runner.rank != 0 or not sys.stderr.isatty()
        self._bar = tqdm(total=len(runner.test_dataloader), unit="batch", desc="evaluating", disable=silent)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Move it."""
        self._bar.update()

    def after_test_epoch(self, runner: Runner, metrics=None) -> None:
        """Remove it."""
        self._bar.close()


def build_hooks(described: Sequence[Mapping[str, Any]]) -> list[Hook]:
    """Return the hooks of mmengine that a config's ``custom_hooks`` describe.

    Args:
        described: For each its ``type``, a name registered with mmengine's ``HOOKS``, and its arguments.

    Raises:
        TaskError: If there is no such hook, or it doesn't take an argument.
    """
    hooks = []
    for number, entry in enumerate(described):
        place = f"custom_hooks[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
            raise TaskError(f"{place} is {entry!r}; a hook is dict(type='EarlyStoppingHook', ...)")
        if HOOKS.get(entry["type"]) is None:
            raise TaskError(
                f"{place}: mmengine has no hook {entry['type']!r}{nearest(entry['type'], HOOKS.module_dict)}"
            )
        try:
            hooks.append(HOOKS.build(dict(entry)))
        except TypeError as error:
            raise TaskError(f"{place}: {entry['type']}: {call_fault(error)}") from error
    return hooks
