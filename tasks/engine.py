"""Training and evaluation of any task; the only file that knows mmengine.

A run is described by a config: a Python file that sets some of the keys of `DEFAULTS` and of its task's, and may
inherit from others by ``_base_``. What mmengine 0.10.7 does not do with a current torch is done here: checkpoints
without pickled objects, mixed precision on any device, processes on CPU, resuming that is exact or refused.
"""

import ast
import copy
import importlib
import json
import math
import os
import random
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import TASKS, TaskError, nearest
from .checkpoints import load_weights, read_checkpoint, save_checkpoint, write_whole
from .devices import choose_device

try:
    # mmengine's Runner imports it, and the wheel with a window system needs libraries that slim containers lack.
    import cv2  # noqa: F401
except ImportError as error:
    raise TaskError(
        f"OpenCV can't be imported ({str(error).splitlines()[0]}); cure: "
        "pip install --force-reinstall --no-deps opencv-python-headless"
    ) from error

from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import CosineAnnealingLR, LinearLR, MultiStepLR, OptimWrapper, PolyLR
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

# Every key that a config of any task may have, with its default; a task adds its own.
DEFAULTS = {
    "task": None,
    "seed": 0,
    "deterministic": False,  # refuse nondeterministic CUDA kernels
    "device": "auto",  # "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", "mps"
    "precision": "float32",  # or "bfloat16", "float16": autocast
    "batch_size": 64,  # of each process
    "workers": 0,  # processes that load data, for each process that trains
    "epochs": 10,
    "iterations": None,  # instead of epochs: batches to train on, rounded up to whole epochs
    "val_interval": 1,  # epochs between validations; the last epoch always has one
    "sync_batchnorm": False,  # batch norm over the images of all processes, on CUDA
    "optimizer": {
        "name": "adamw",  # any optimizer of timm
        "lr": 1e-3,
        "weight_decay": 0.05,
        "no_decay": None,  # parts of parameters' names without weight decay; None: biases and norms
        "layer_decay": None,  # factor of the learning rate from a layer to the one below it
        "factors": {},  # of the learning rate, by part of parameters' names, such as {"backbone.": 0.1}
        "clip_grad": None,  # greatest norm of the gradient
        "accumulate": 1,  # batches for each step
        "kwargs": {},
    },
    "schedule": {
        "name": "cosine",  # or "poly", "step"
        "warmup_epochs": 0,  # linear, from warmup_factor
        "warmup_iterations": 0,  # the same, counted in batches
        "warmup_factor": 0.01,
        "final_factor": 0.01,  # of the learning rate, at the end of cosine and poly
        "power": 1.0,  # of poly
        "steps": (),  # epochs after which the learning rate is multiplied by gamma
        "gamma": 0.1,
    },
    "ema": None,  # weight of the newest parameters in their running average, such as 2e-4
}
FREE = ("optimizer.kwargs", "optimizer.factors")  # dicts with keys of their own
# Types of what may be None.
OPTIONAL = {
    "iterations": int,
    "optimizer.no_decay": tuple,
    "optimizer.layer_decay": float,
    "optimizer.clip_grad": float,
    "ema": float,
}
SCHEDULES = ("cosine", "poly", "step")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What may differ between a run and its continuation.
_RESUME_FREE = ("device", "workers")

_TYPES = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    str: ("a name", lambda value: isinstance(value, str)),
    tuple: ("a list", lambda value: isinstance(value, list | tuple)),
    dict: ("a dict", lambda value: isinstance(value, dict)),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config and complete it with the defaults.

    Args:
        path: Python file.
        overrides: Assignments such as ``"optimizer.lr=1e-3"``; values are Python literals, or else strings.

    Returns:
        Nested dict with a value for every key.

    Raises:
        TaskError: If the file can't be read, a key is unknown or a value is of another type than its default.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(f"{path}: no such config")
    if path.suffix != ".py":
        raise TaskError(f"{path}: a config is a Python file")
    try:
        given = Config.fromfile(path, lazy_import=False).to_dict()
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise TaskError(f"{path}: {type(error).__name__}: {reason}") from error
    defaults = copy.deepcopy(DEFAULTS)
    task = given.get("task")
    if task not in TASKS:
        raise TaskError(f"{path}: task is {task!r}{nearest(str(task), TASKS)}")
    task_class = _task_class(task)
    defaults |= copy.deepcopy(task_class.DEFAULTS)
    free = FREE + tuple(task_class.FREE)
    optional = OPTIONAL | {"task": str} | task_class.OPTIONAL
    config = copy.deepcopy(defaults)
    for key, value in _leaves(given, free):
        _assign(config, defaults, free, optional, key, value, str(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise TaskError(f"{override!r}: an override is key=value, such as optimizer.lr=1e-3")
        if key == "task":
            raise TaskError(f"{override}: a config is about its task, which is {task!r}; take another config")
        _assign(config, defaults, free, optional, key, _parse(text), override)
    _check_values(config)
    return config


def format_config(config: dict[str, Any]) -> str:
    """Return a config as the Python file that gives it."""
    return Config(config).pretty_text


def _task_class(name: str):
    return importlib.import_module(f".{name}", __package__).Task


def _leaves(tree: dict, free: Sequence[str], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of a nested dict; a dict under a free key, or an empty one, is a value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in free:
            yield from _leaves(value, free, f"{key}.")
        else:
            yield key, value


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)


def _assign(
    config: dict, defaults: dict, free: Sequence[str], optional: dict[str, type], key: str, value: Any, source: str
) -> None:
    """Set ``config[key]`` if the defaults know the key and a value of this type."""
    *parents, name = key.split(".")
    if any(".".join(parents[:depth]) in free for depth in range(1, len(parents) + 1)):
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
        return
    known = dict(_leaves(defaults, free))
    if key not in known:
        own = [leaf for leaf in known if leaf.startswith(f"{key}.")]
        hint = f"; set one of its own keys: {', '.join(own)}" if own else nearest(key, known)
        raise TaskError(f"{source}: unknown key {key!r}{hint}")
    default = known[key]
    expected, fits = _TYPES[optional.get(key, type(default))]
    may_be_none = default is None or key in optional
    if not fits(value) and not (value is None and may_be_none):
        example = f", such as {default!r}" if default not in (None, {}) else " or None" if default is None else ""
        raise TaskError(f"{source}: {key} takes {expected}{example}, not {value!r}")
    node = config
    for parent in parents:
        node = node[parent]
    node[name] = value


def _check_values(config: dict) -> None:
    optimizer, schedule = config["optimizer"], config["schedule"]
    checks = (
        ("precision", config["precision"], config["precision"] in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        ("batch_size", config["batch_size"], config["batch_size"] > 0, "at least 1"),
        ("workers", config["workers"], config["workers"] >= 0, "at least 0"),
        ("epochs", config["epochs"], config["epochs"] > 0, "at least 1"),
        ("iterations", config["iterations"], config["iterations"] is None or config["iterations"] > 0, "at least 1"),
        ("val_interval", config["val_interval"], config["val_interval"] > 0, "at least 1"),
        ("optimizer.accumulate", optimizer["accumulate"], optimizer["accumulate"] > 0, "at least 1"),
        (
            "schedule.warmup_epochs",
            schedule["warmup_epochs"],
            0 <= schedule["warmup_epochs"] < (config["epochs"] if config["iterations"] is None else math.inf),
            f"from 0 to less than epochs ({config['epochs']})",
        ),
        (
            "schedule.warmup_iterations",
            schedule["warmup_iterations"],
            schedule["warmup_iterations"] >= 0 and not (schedule["warmup_iterations"] and schedule["warmup_epochs"]),
            "at least 0, and 0 with warmup_epochs",
        ),
        ("schedule.name", schedule["name"], schedule["name"] in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        (
            "schedule.steps",
            schedule["steps"],
            list(schedule["steps"]) == sorted(set(schedule["steps"])) and min(schedule["steps"], default=1) > 0,
            "ascending epochs",
        ),
    )
    for key, value, holds, rule in checks:
        if not holds:
            raise TaskError(f"{key} is {value!r}, but must be {rule}")
    if optimizer["name"] not in list_optimizers():
        raise TaskError(
            f"optimizer.name: unknown optimizer {optimizer['name']!r}{nearest(optimizer['name'], list_optimizers())}"
        )


def is_main_process() -> bool:
    """Return whether this process is the one that reports; under torchrun there are others."""
    return int(os.environ.get("RANK", "0")) == 0


def train(config: dict[str, Any], output: str | Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train a model as a config of `load_config` says. Under torchrun, every process calls this.

    Writes to ``output``: ``config.py`` (complete), ``history.json`` (one entry an epoch), ``last.pth`` (everything a
    continuation needs), ``best.pth`` (the weights of the epoch with the best metric), and the task's pictures.

    Args:
        config: What to do.
        output: Folder of the run.
        resume: Continue from ``output/last.pth``, to the same result as if there had been no interruption.
        progress: Whether to show it: a bar on a terminal, else lines.

    Returns:
        ``metrics`` of the best epoch, by ``metric``, ``history``, the paths ``best`` and ``last``, and ``pictures``, a
        list of ``(file name, what it shows)``.

    Raises:
        TaskError: If the run can't be done, ``output`` holds another run, or the loss ceases to be a number.
    """
    output = Path(output)
    last = output / "last.pth"
    if last.exists() and not resume:
        raise TaskError(f"{output}: already holds a run; continue it with --resume, or choose another --output")
    checkpoint = read_checkpoint(last, config["task"]) if resume else None
    device, distributed = _launch(config["device"])
    task = _task_class(config["task"])(_without_start(config) if resume else config)
    loader = _loader(task.train_set, config, device, shuffle=True)
    epochs = _count_epochs(config, len(loader))
    metric = _Metric(task)
    history: list[dict[str, Any]] = []
    if checkpoint is not None:
        _check_resumable(checkpoint, config, task, output)
        history = checkpoint["history"]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # The schedule counts batches, and with accumulation the first step comes later.
        warnings.filterwarnings("ignore", "Detected call of `scheduler.step")
        warnings.filterwarnings("ignore", "Setting (OMP|MKL)_NUM_THREADS")
        runner = _Runner(
            task,
            config,
            device,
            scratch,
            distributed,
            train_dataloader=loader,
            train_cfg={"by_epoch": True, "max_epochs": epochs, "val_interval": config["val_interval"]},
            optim_wrapper={"type": "OptimWrapper"},
            param_scheduler=_schedulers(config, epochs, len(loader)),
            val_dataloader=_loader(task.val_set, config, device, shuffle=False),
            val_cfg={},
            val_evaluator=Evaluator([metric]),
            custom_hooks=[
                _SeedHook(config["seed"]),
                run_hook := _RunHook(task, config, output, history, metric, progress),
                *([EMAHook(momentum=config["ema"])] if config["ema"] is not None else []),
            ],
            load_from=str(last) if resume else None,
            resume=resume,
        )
        if runner.rank == 0:
            write_whole(output / "config.py", lambda file: Path(file).write_text(format_config(config)))
        _without_worker_traceback(runner.train)
        pictures = run_hook.draw() if runner.rank == 0 else []
    _leave(distributed)
    best = max(history, key=lambda entry: entry.get(f"val/{task.metric}", -math.inf))
    return {
        "metrics": {key.removeprefix("val/"): value for key, value in best.items() if key.startswith("val/")},
        "metric": task.metric,
        "history": history,
        "best": output / "best.pth",
        "last": last,
        "pictures": pictures,
    }


def evaluate(
    config: dict[str, Any], checkpoint_path: str | Path, progress: bool = True
) -> tuple[dict[str, float], list, list]:
    """Measure a checkpoint of `train` on the validation set of a config.

    Returns:
        The metrics, and for every image, in the order of the set, the task's prediction and the target.

    Raises:
        TaskError: If the evaluation can't be done.
        CheckpointError: If the checkpoint can't be read or doesn't hold the config's model.
    """
    checkpoint = read_checkpoint(checkpoint_path, config["task"])
    device, distributed = _launch(config["device"])
    task = _task_class(config["task"])(_without_start(config))
    card, expected = checkpoint["card"], task.card()
    for key in ("model", "classes"):
        if card[key] != expected[key]:
            raise TaskError(f"{checkpoint_path}: its {key} is {card[key]}, but the config's is {expected[key]}")
    metric = _Metric(task)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting (OMP|MKL)_NUM_THREADS")
        runner = _Runner(
            task,
            config,
            device,
            scratch,
            distributed,
            test_dataloader=_loader(task.val_set, config, device, shuffle=False),
            test_cfg={},
            test_evaluator=Evaluator([metric]),
            custom_hooks=[_TestProgressHook()] if progress else [],
        )
        load_weights(runner.net, checkpoint["state_dict"], checkpoint_path)
        metrics = _without_worker_traceback(runner.test)
    _leave(distributed)
    return {key.removeprefix("val/"): value for key, value in metrics.items()}, *metric.collected


def _without_start(config: dict) -> dict:
    """Return a config whose model starts from nothing: its weights will come from a checkpoint of the run."""
    nothing = {"pretrained": False, "checkpoint": None, "backbone_checkpoint": None}
    return config | {"model": config["model"] | {key: nothing[key] for key in nothing if key in config["model"]}}


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
        lines = str(error).strip().splitlines()
        raise TaskError(lines[-1].rpartition("TaskError: ")[2]) from error


def _check_resumable(checkpoint: dict, config: dict, task, output: Path) -> None:
    if "optimizer" not in checkpoint:
        raise TaskError(f"{output / 'last.pth'}: holds no state of the optimizer to continue with")
    free = FREE + tuple(task.FREE)
    before, now = dict(_leaves(checkpoint["config"], free)), dict(_leaves(_plain(config), free))
    for key in now:
        if key not in _RESUME_FREE and before.get(key) != now[key]:
            reason = " (its learning rate has been scheduled for that)" if key == "epochs" else ""
            raise TaskError(
                f"{output}: was begun with {key}={before.get(key)!r}{reason}, not {now[key]!r}; resume with the same "
                f"settings, or begin a new run from its weights: model.checkpoint={output / 'last.pth'}"
            )
    if checkpoint["card"]["classes"] != task.card()["classes"]:
        raise TaskError(f"{output}: was begun with the classes {checkpoint['card']['classes']}; the data set changed")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if checkpoint["meta"]["processes"] != processes:
        raise TaskError(f"{output}: was begun by {checkpoint['meta']['processes']} processes, not {processes}")


def _plain(value: Any) -> Any:
    """Return nested containers as dicts and lists, as they come back from a file."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _loader(dataset, config: dict, device: torch.device, shuffle: bool) -> DataLoader:
    return DataLoader(
        dataset,
        config["batch_size"],
        sampler=DefaultSampler(dataset, shuffle=shuffle, seed=config["seed"]),
        num_workers=config["workers"],
        drop_last=shuffle and len(dataset) >= config["batch_size"] * int(os.environ.get("WORLD_SIZE", "1")),
        pin_memory=device.type == "cuda",
        collate_fn=getattr(dataset, "collate", None),
    )


def _count_epochs(config: dict, batches: int) -> int:
    """Return for how many epochs of ``batches`` a run lasts, or raise a TaskError if its warmup doesn't fit."""
    if batches == 0:
        raise TaskError("the training set is empty")
    epochs = config["epochs"] if config["iterations"] is None else -(-config["iterations"] // batches)
    schedule = config["schedule"]
    warmup = schedule["warmup_iterations"] + schedule["warmup_epochs"] * batches
    if warmup >= epochs * batches:
        raise TaskError(f"the warmup of {warmup} batches must be shorter than the run, which has {epochs * batches}")
    return epochs


def _schedulers(config: dict, epochs: int, batches: int) -> list[dict]:
    """Return a linear warmup and the schedule, by iterations; their ends are explicit, as resuming relies on them."""
    schedule, total = config["schedule"], epochs * batches
    warmup = schedule["warmup_iterations"] + schedule["warmup_epochs"] * batches
    span = {"begin": warmup, "end": total, "by_epoch": False}
    if schedule["name"] == "step":
        steps = [step * batches for step in schedule["steps"]]
        after = {"type": MultiStepLR, "milestones": steps, "gamma": schedule["gamma"], **span, "begin": 0}
    elif schedule["name"] == "poly":
        least = schedule["final_factor"] * config["optimizer"]["lr"]
        after = {"type": PolyLR, "power": schedule["power"], "eta_min": least, **span}
    else:
        after = {
            "type": CosineAnnealingLR,
            "eta_min_ratio": schedule["final_factor"],
            "T_max": total - warmup,
            **span,
        }
    if warmup == 0:
        return [after]
    ramp = {"type": LinearLR, "start_factor": schedule["warmup_factor"], "begin": 0, "end": warmup, "by_epoch": False}
    return [ramp, after]


class _Model(BaseModel):
    """A task's model and losses in the form that the Runner calls, under autocast."""

    def __init__(self, task, precision: str, device: torch.device):
        super().__init__()
        self.net = task.build_model()
        # In functions, which the EMA's deep copy shares, so that the data sets are not copied.
        self._loss = lambda *batch: task.loss(*batch)
        self._predict = lambda *batch: task.predict(*batch)
        self._autocast = {
            "device_type": device.type,
            "dtype": PRECISIONS[precision],
            "enabled": PRECISIONS[precision] is not None,
        }

    def init_weights(self) -> None:
        """Keep the weights: mmengine would initialise the model again, published weights included."""

    def forward(self, inputs: Tensor, targets: Any, mode: str = "predict"):
        """Return the losses of a batch in mode ``"loss"``, else a prediction for every image."""
        with torch.autocast(**self._autocast):
            if mode == "loss":
                return self._loss(self.net, inputs, targets)
            return self._predict(self.net, inputs)


class _OptimWrapper(OptimWrapper):
    """Steps with scaled gradients under float16, on any device; mmengine's own only knows CUDA."""

    def __init__(self, optimizer, device: torch.device, scaled: bool, **kwargs):
        super().__init__(optimizer, **kwargs)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def backward(self, loss: Tensor, **kwargs) -> None:
        super().backward(self.scaler.scale(loss), **kwargs)

    def step(self, **kwargs) -> None:
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def state_dict(self) -> dict:
        return super().state_dict() | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.scaler.load_state_dict(state_dict.pop("scaler"))
        super().load_state_dict(state_dict)


class _Runner(Runner):
    """mmengine's Runner, silent at the start, on the device it is told, with safe and complete checkpoints.

    Its own log folder lands in ``scratch``; what a run leaves, `_RunHook` writes.
    """

    def __init__(self, task, config: dict, device: torch.device, scratch: str, distributed: bool, **kwargs):
        self._task = task
        self._config = config
        self._device = device
        super().__init__(
            # As a dict, the model is built after the seed is set.
            model={"type": _Model, "task": task, "precision": config["precision"], "device": device},
            work_dir=scratch,
            default_hooks={"runtime_info": None, "timer": None, "logger": None, "checkpoint": None},
            launcher="pytorch" if distributed else "none",
            log_level="ERROR",
            randomness={"seed": config["seed"], "deterministic": config["deterministic"]},
            experiment_name=f"foveate-{uuid.uuid4().hex}",
            **kwargs,
        )

    @property
    def net(self) -> nn.Module:
        """The task's model, unwrapped."""
        return getattr(self.model, "module", self.model).net

    def build_logger(self, log_level="ERROR", **kwargs) -> MMLogger:
        """Return a logger without a file: the run has its history."""
        return MMLogger.get_instance(self.experiment_name, log_level=log_level)

    def build_visualizer(self, visualizer=None) -> Visualizer:
        """Return a visualizer that writes nothing."""
        return Visualizer.get_instance(self.experiment_name)

    def _log_env(self, env_cfg: dict) -> None:
        """Skip the environment report: it starts compilers to ask their versions."""

    def dump_config(self) -> None:
        """Write nothing: `train` writes the config."""

    def wrap_model(self, model_wrapper_cfg, model: nn.Module) -> nn.Module:
        """Move the model to the run's device, and under torchrun wrap it for several processes."""
        model = model.to(self._device)
        if not self.distributed:
            return model
        if self._config["sync_batchnorm"] and self._device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return MMDistributedDataParallel(
            model, device_ids=[self._device.index] if self._device.type == "cuda" else None, broadcast_buffers=False
        )

    def build_optim_wrapper(self, optim_wrapper) -> OptimWrapper:
        """Return the config's optimizer, with timm's parameter groups; built once."""
        if isinstance(optim_wrapper, OptimWrapper):
            return optim_wrapper
        settings = self._config["optimizer"]
        by_name = settings["no_decay"] is not None or settings["factors"]
        if by_name and settings["layer_decay"] is not None:
            raise TaskError("optimizer.layer_decay can't be combined with optimizer.no_decay or optimizer.factors")
        try:
            optimizer = create_optimizer_v2(
                _groups_by_name(self.net, settings) if by_name else self.net,
                settings["name"],
                lr=settings["lr"],
                weight_decay=settings["weight_decay"],
                layer_decay=settings["layer_decay"],
                **settings["kwargs"],
            )
        except TypeError as error:
            raise TaskError(f"optimizer.kwargs: {str(error).split('() ')[-1]}") from error
        for group in optimizer.param_groups:
            # timm leaves this to its own schedulers.
            group["lr"] *= group.pop("lr_scale", 1.0)
        return _OptimWrapper(
            optimizer,
            self._device,
            scaled=self._config["precision"] == "float16",
            accumulative_counts=settings["accumulate"],
            clip_grad={"max_norm": settings["clip_grad"]} if settings["clip_grad"] is not None else None,
        )

    def save_checkpoint(self, path: Path, epoch: int, history: list[dict], complete: bool) -> None:
        """Write tensors and plain types only; ``complete`` adds what a continuation needs."""
        checkpoint = {
            "card": self._task.card() | {"epoch": epoch, "metrics": history[-1]},
            "config": _plain(self._config),
            "meta": {"epoch": epoch, "iter": epoch * len(self.train_dataloader), "processes": self.world_size},
            "state_dict": {f"net.{key}": value for key, value in self.net.state_dict().items()},
        }
        if complete:
            checkpoint |= {
                "history": history,
                "optimizer": self.optim_wrapper.state_dict(),
                "param_schedulers": [scheduler.state_dict() for scheduler in self.param_schedulers],
            }
        # The EMA hook exchanges the weights for the averaged ones here, and adds the others.
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        checkpoint["state_dict"] = {
            key.removeprefix("net."): value.cpu() for key, value in checkpoint["state_dict"].items()
        }
        if not complete:
            checkpoint.pop("ema_state_dict", None)
        if self.rank == 0:
            save_checkpoint(checkpoint, path)

    def load_checkpoint(self, filename: str, map_location="cpu", **kwargs) -> dict:
        """Read a checkpoint of `save_checkpoint` and load its weights, all of them."""
        checkpoint = read_checkpoint(filename)
        checkpoint["state_dict"] = {f"net.{key}": value for key, value in checkpoint["state_dict"].items()}
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        state = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}
        load_weights(self.net, state, filename)
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}
        return checkpoint


def _groups_by_name(model: nn.Module, settings: dict) -> list[dict]:
    """Return parameter groups by the parts of names in ``no_decay`` and ``factors``; the longest part wins."""
    groups: dict[tuple[float, float], dict] = {}
    unused = {*(settings["no_decay"] or ()), *settings["factors"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if settings["no_decay"] is None:
            plain = parameter.ndim <= 1 or name.endswith(".bias")
        else:
            held = [part for part in settings["no_decay"] if part in name]
            unused -= set(held)
            plain = bool(held)
        held = sorted((part for part in settings["factors"] if part in name), key=len)
        unused -= set(held)
        decay, factor = 0.0 if plain else settings["weight_decay"], settings["factors"][held[-1]] if held else 1.0
        group = groups.setdefault((decay, factor), {"params": [], "weight_decay": decay, "lr_scale": factor})
        group["params"].append(parameter)
    strange = sorted(unused & set(settings["factors"]))
    if strange:
        raise TaskError(f"optimizer.factors: no parameter's name holds {strange[0]!r}")
    return list(groups.values())


class _Metric(BaseMetric):
    """Gathers predictions and targets from all processes for the task's ``measure``."""

    def __init__(self, task):
        super().__init__(collect_device="gpu", prefix="val")
        self._task = task
        self.collected: tuple[list, list] = ([], [])

    def process(self, data_batch: Sequence, data_samples: Sequence) -> None:
        """Keep a batch's predictions, on the CPU, with its targets."""
        targets = data_batch[1]
        self.results.extend((_cpu(sample), _cpu(target)) for sample, target in zip(data_samples, targets, strict=True))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Return the task's metrics."""
        predictions, targets = (list(column) for column in zip(*results, strict=True))
        self.collected = (predictions, targets)
        return self._task.measure(predictions, targets)


def _cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _cpu(item) for key, item in value.items()}
    return value


class _SeedHook(Hook):
    """Seeds every epoch by its number: a continued run then draws what an uninterrupted one would."""

    priority = "VERY_HIGH"

    def __init__(self, seed: int):
        self._seed = seed

    def before_train_epoch(self, runner: Runner) -> None:
        seed = int(np.random.SeedSequence((self._seed, runner.epoch, runner.rank)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


class _RunHook(Hook):
    """Reports progress, keeps the history and writes the checkpoints, after everything else an epoch does."""

    priority = "VERY_LOW"

    def __init__(self, task, config: dict, output: Path, history: list[dict], metric: "_Metric", progress: bool):
        self._task, self._config, self._output = task, config, output
        self._history = history
        self._metric = metric
        self._progress = progress
        self._bar = None
        self._shown: tuple[int, list, list] | None = None

    def before_train(self, runner: Runner) -> None:
        self._speak = self._progress and runner.rank == 0
        self._began, self._from_iter = time.monotonic(), runner.iter
        if self._speak and sys.stderr.isatty():
            self._bar = tqdm(
                total=runner.max_iters, initial=runner.iter, unit="batch", dynamic_ncols=True, desc="training"
            )

    def before_train_epoch(self, runner: Runner) -> None:
        self._losses: list[Tensor] = []
        self._parts: dict[str, list[Tensor]] = {}
        self._epoch_began = self._last_line = time.monotonic()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._losses.append(outputs["loss"].detach())
        for name, value in outputs.items():
            if name != "loss":
                self._parts.setdefault(name, []).append(value.detach())
        if self._bar is not None:
            self._bar.update()
        elif self._speak and time.monotonic() - self._last_line > 60:
            # Long epochs without a terminal still show that they move.
            self._last_line = time.monotonic()
            batches = len(runner.train_dataloader)
            print(f"epoch {runner.epoch + 1}, batch {batch_idx + 1}/{batches}, {self._left(runner)} left", flush=True)
        if len(self._losses) % 100 == 0:
            self._check_finite(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        self._check_finite(runner)
        epoch = runner.epoch + 1
        self._entry = {
            "epoch": epoch,
            "lr": max(group["lr"] for group in runner.optim_wrapper.param_groups),
            "train/loss": float(torch.stack(self._losses).float().mean()),
            **{f"train/{name}": float(torch.stack(values).float().mean()) for name, values in self._parts.items()},
        }
        if epoch % self._config["val_interval"] and epoch != runner.max_epochs:
            self._end_epoch(runner, {})

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._end_epoch(runner, metrics or {})

    def after_train(self, runner: Runner) -> None:
        if self._bar is not None:
            self._bar.close()

    def _end_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        key = f"val/{self._task.metric}"
        best = max((entry[key] for entry in self._history if key in entry), default=-math.inf)
        entry = self._entry | metrics | {"seconds": round(time.monotonic() - self._epoch_began, 2)}
        self._history.append(_plain(entry))
        if metrics.get(key, -math.inf) > best:
            self._shown = (entry["epoch"], *self._metric.collected)
            runner.save_checkpoint(self._output / "best.pth", entry["epoch"], self._history, complete=False)
        runner.save_checkpoint(self._output / "last.pth", entry["epoch"], self._history, complete=True)
        if runner.rank == 0:
            text = json.dumps(self._history, indent=1)
            write_whole(self._output / "history.json", lambda file: Path(file).write_text(text))
        if self._speak:
            measured = {name.removeprefix("val/"): value for name, value in metrics.items()}
            shown = getattr(self._task, "shown", measured)
            measured = "".join(f"  {name} {value:.4f}" for name, value in measured.items() if name in shown)
            line = (
                f"epoch {entry['epoch']:>3}/{runner.max_epochs}  train loss {entry['train/loss']:.4f}"
                f"{'  held out:' if measured else ''}{measured}  {entry['seconds']:.1f} s, {self._left(runner)} left"
            )
            tqdm.write(line) if self._bar is not None else print(line, flush=True)

    def draw(self) -> list[tuple[str, str]]:
        """Let the task draw what it predicted in the best epoch, or if that was before a continuation in the last."""
        if not hasattr(self._task, "draw"):
            return []
        epoch, predictions, targets = self._shown or (self._history[-1]["epoch"], *self._metric.collected)
        return self._task.draw(predictions, targets, self._output, epoch)

    def _left(self, runner: Runner) -> timedelta:
        done = max(1, runner.iter - self._from_iter)
        seconds = (time.monotonic() - self._began) / done * (runner.max_iters - runner.iter)
        return timedelta(seconds=round(seconds))

    def _check_finite(self, runner: Runner) -> None:
        if not torch.isfinite(torch.stack(self._losses[-100:])).all():
            if self._bar is not None:
                self._bar.close()
            raise TaskError(
                f"the loss ceased to be a number in epoch {runner.epoch + 1}; lower optimizer.lr (now "
                f"{self._config['optimizer']['lr']}), set optimizer.clip_grad=1.0, or use precision=float32"
            )


class _TestProgressHook(Hook):
    """A bar over the batches of an evaluation, on a terminal."""

    def before_test_epoch(self, runner: Runner) -> None:
        silent = runner.rank != 0 or not sys.stderr.isatty()
        self._bar = tqdm(total=len(runner.test_dataloader), unit="batch", desc="evaluating", disable=silent)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._bar.update()

    def after_test_epoch(self, runner: Runner, metrics=None) -> None:
        self._bar.close()
