"""mmengine's Runner with a task's model, timm's optimizers, any device, and safe and complete checkpoints."""

import contextlib
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.visualization import Visualizer
from timm.optim import create_optimizer_v2
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, default_collate

from ...blocks.losses import collect_losses
from ...zoo import BackboneError, CheckpointError, UnknownModelError
from ...zoo.checkpoint import load
from ...zoo.library_errors import call_fault, first_line
from .. import TaskError
from ..adapters import add_adapters, describe_base, fingerprint_base, is_new, is_saved
from ..checkpoints import read_checkpoint, save_checkpoint, taken_as_said
from ..dense.build import freeze_statistics
from ..frozen import freeze
from .config import PRECISIONS, plain
from .groups import group
from .loading import fingerprint
from .schedule import learning_rate

# Images of the batch that is tried before the first epoch, where a whole one would take long.
_TRIED = 2


def _build(task, config: dict) -> nn.Module:
    """Return a task's model; options that it can't be built with are refused in one line."""
    try:
        return task.build_model()
    except (TaskError, BackboneError, CheckpointError, UnknownModelError):
        raise
    except Exception as error:
        given = [f"model.{key}" for key in ("kwargs", "backbone_kwargs") if config["model"].get(key)]
        if not given:
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise TaskError(f"the model can't be built ({reason}); look at {' and '.join(given)}") from error


class TaskModel(BaseModel):
    """A task's model and losses in the form that the Runner calls, under autocast."""

    def __init__(self, task, config: dict, device: torch.device):
        super().__init__()
        self.net = _build(task, config)
        self._frozen = freeze(self.net, config["freeze"])
        # What is saved of the model, and of which weights that is the difference; None: all of it.
        self.saved: Callable[[str], bool] | None = None
        self.adapted: dict[str, Any] | None = None
        if config["lora"]["rank"] is not None:
            self._adapt(config)
        if config["grad_checkpointing"]:
            _checkpoint_gradients(self.net)
        self.memory_format = torch.channels_last if config["channels_last"] else torch.preserve_format
        dtype = PRECISIONS[config["precision"]]
        # In functions, which the EMA's deep copy shares, so that the data sets are not copied.
        self._loss = lambda *batch: task.loss(*batch)
        self._predict = lambda *batch: task.predict(*batch)
        self._autocast = {
            "device_type": device.type,
            "dtype": dtype,
            "enabled": dtype is not None,
        }

    def _adapt(self, config: dict) -> None:
        """Add adapters to the model, and note of which weights."""
        if config["freeze"]:
            raise TaskError("lora freezes all but its adapters and what is new; leave freeze out")
        base, new = describe_base(config["model"]), is_new(config["task"], self.net)
        rest = {name: value for name, value in self.net.state_dict().items() if not new(name)}
        settings = config["lora"]
        self.adapted = {"base": base, "sha256": fingerprint_base(rest), "rank": settings["rank"]}
        self.adapted |= {"alpha": settings["alpha"]}
        body = getattr(self.net, "backbone", self.net)
        add_adapters(self.net, body, new, settings)
        self._frozen = [body]
        self.saved = partial(is_saved, new=new)

    def train(self, mode: bool = True) -> "TaskModel":
        """Train or not; the norms of what doesn't learn keep their statistics."""
        super().train(mode)
        for module in self._frozen:
            freeze_statistics(module)
        return self

    def init_weights(self) -> None:
        """Keep the weights: mmengine would initialise the model again, published weights included."""

    def forward(self, inputs: Tensor, targets: Any, mode: str = "predict"):
        """Return the losses of a batch in mode ``"loss"``, else a prediction for every image."""
        if isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = inputs.to(memory_format=self.memory_format)
        with torch.autocast(**self._autocast):
            if mode == "loss":
                with collect_losses() as own:
                    losses = self._loss(self.net, inputs, targets)
                return losses | {f"loss_{name}": value for name, value in own.items()}
            return self._predict(self.net, inputs)


def _checkpoint_gradients(net: nn.Module) -> None:
    """Let a model, or the backbone of a detector or segmenter, compute activations twice instead of keeping them."""
    body = getattr(net, "backbone", net)
    enable = getattr(body, "set_grad_checkpointing", None)
    try:
        if enable is None:
            raise AttributeError
        enable(True)
    except (AttributeError, AssertionError):
        raise TaskError(f"{type(body).__name__} can't recompute activations; set grad_checkpointing=False") from None


class ScaledOptimWrapper(OptimWrapper):
    """Steps with scaled gradients under float16, on any device; mmengine's own only knows CUDA."""

    def __init__(self, optimizer, device: torch.device, scaled: bool, **kwargs):
        super().__init__(optimizer, **kwargs)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Compute gradients of the scaled loss."""
        super().backward(self.scaler.scale(loss), **kwargs)

    def step(self, **kwargs) -> None:
        """Step with gradients as they are without the scale, clipped if asked for."""
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        try:
            self.scaler.step(self.optimizer, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            reason = str(error).splitlines()[0]
            raise TaskError(f"the optimizer can't make a step of optimizer.lr={rate:g}: {reason}; lower it") from error
        self.scaler.update()

    @property
    def has_gradients(self) -> bool:
        """Whether batches were accumulated since the last step."""
        return self._inner_count % self._accumulative_counts != 0 and self._inner_count != self._max_counts

    def state_dict(self) -> dict:
        """Return the optimizer's state and the scale."""
        return super().state_dict() | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take both."""
        self.scaler.load_state_dict(state_dict.pop("scaler"))
        super().load_state_dict(state_dict)


class TaskRunner(Runner):
    """mmengine's Runner, silent at the start, on the device it is told, with safe and complete checkpoints.

    Its own log folder lands in ``scratch``; what a run leaves, `RunHook` writes.

    Attributes:
        tried: What was found out before the first epoch.
        begun: Of a continued run, what the epoch that was interrupted had measured.
    """

    def __init__(self, task, config: dict, device: torch.device, scratch: str, distributed: bool, **kwargs):
        self._task = task
        self._config = config
        self._device = device
        self.tried = ""
        self.begun: dict[str, Any] | None = None
        self._data = {"train": fingerprint(task.train_set), "val": fingerprint(task.val_set)}
        super().__init__(
            # As a dict, the model is built after the seed is set.
            model={"type": TaskModel, "task": task, "config": config, "device": device},
            work_dir=scratch,
            default_hooks=dict.fromkeys(("runtime_info", "timer", "logger", "checkpoint", "sampler_seed")),
            launcher="pytorch" if distributed else "none",
            log_level="ERROR",
            randomness={"seed": config["seed"], "deterministic": config["deterministic"]},
            experiment_name=f"foveate-{uuid.uuid4().hex}",
            **kwargs,
        )
        if self._train_dataloader is not None:
            # Now, that nothing is written yet where its settings are refused.
            self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)

    @property
    def module(self) -> TaskModel:
        """The model and its losses, unwrapped."""
        return getattr(self.model, "module", self.model)

    @property
    def net(self) -> nn.Module:
        """The task's model, unwrapped."""
        return self.module.net

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
        """Move the model to the run's device, try it, and under torchrun wrap it for several processes."""
        model = model.to(self._device, memory_format=model.memory_format)
        unused = self._try(model) if self._train_dataloader is not None else False
        if not self.distributed:
            return model
        if self._config["sync_batchnorm"] and self._device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return MMDistributedDataParallel(
            model,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=unused,
        )

    def _try(self, model: TaskModel) -> bool:
        """Train on a batch without a step, and predict on a held-out one: what can't work is said now, in seconds.

        Returns:
            Whether there are parameters that this batch had no use for.
        """
        began = time.monotonic()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # Only accelerators run out of memory soon, and only on them is a whole batch fast.
        count = self._config["batch_size"] if self._device.type == "cuda" else _TRIED
        count = min(count, self._config["batch_size"])
        try:
            model.train()
            batch = _first_batch(self._train_dataloader, count)
            loss, _ = model.parse_losses(model(*model.data_preprocessor(batch, training=True), mode="loss"))
            if not torch.isfinite(loss):
                raise TaskError(
                    f"the loss of the first batch is {loss.item()}; look at the weights that are started from"
                )
            loss.backward()
            unused = any(weight.grad is None for weight in model.parameters() if weight.requires_grad)
            model.zero_grad(set_to_none=True)
            model.eval()
            with torch.no_grad():
                inputs, _ = model.data_preprocessor(_first_batch(self._val_dataloader, 1))
                model(inputs, None, mode="predict")
        except TaskError:
            raise
        except torch.OutOfMemoryError as error:
            raise TaskError(
                f"a batch of {count} does not fit into the memory of {self._device}; lower batch_size, with a higher "
                "optimizer.accumulate instead, or set precision=bfloat16 or grad_checkpointing=True"
            ) from error
        except Exception as error:  # settings meet libraries here, which fail in any way
            reason = first_line(error)
            raise TaskError(
                f"a first batch of {count} fails ({type(error).__name__}: {reason}); look at data.* and model.*"
            ) from error
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.tried = f"a batch of {count} forward and backward in {time.monotonic() - began:.1f} s"
        return unused

    def has_loss(self, batch: Any) -> bool:
        """Return whether a batch that was trained on has a loss that is a number; the model stays as it is."""
        model = self.module
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad(), torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            loss, _ = model.parse_losses(model(*model.data_preprocessor(batch, training=True), mode="loss"))
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        return bool(torch.isfinite(loss))

    def estimate_space(self) -> int:
        """Return about how many bytes the checkpoints of the run will need."""
        weights = sum(value.nbytes for value in self.net.state_dict().values())
        # Most optimizers keep two numbers a weight.
        complete = weights * (3 if self._config["ema"] is None else 4)
        # One more is being written while the last is still there.
        return complete * (2 + self._config["checkpoint"]["keep"]) + 2 * weights

    def average_statistics(self) -> None:
        """Give all processes the mean of their batch norms' statistics: each saw other images."""
        if not self.distributed or not any(isinstance(module, _BatchNorm) for module in self.net.modules()):
            return
        averaged = [hook.ema_model.module.net for hook in self.hooks if isinstance(hook, EMAHook)]
        for net in (self.net, *averaged):
            distribute_bn(net, self.world_size, reduce=True)

    def build_optim_wrapper(self, optim_wrapper) -> OptimWrapper:
        """Return the config's optimizer, with timm's parameter groups; built once."""
        if isinstance(optim_wrapper, OptimWrapper):
            return optim_wrapper
        settings = self._config["optimizer"]
        grouped = settings["no_decay"] is not None or settings["factors"] or settings["layer_decay"] is not None
        try:
            optimizer = create_optimizer_v2(
                group(self.net, settings) if grouped else self.net,
                settings["name"],
                lr=learning_rate(self._config),
                weight_decay=settings["weight_decay"],
                **settings["kwargs"],
            )
        except (TypeError, ValueError, AssertionError) as error:
            if not settings["kwargs"]:
                raise
            raise TaskError(f"optimizer.kwargs: {call_fault(error)}") from error
        for part in optimizer.param_groups:
            # timm leaves this to its own schedulers.
            part["lr"] *= part.pop("lr_scale", 1.0)
        return ScaledOptimWrapper(
            optimizer,
            self._device,
            scaled=self._config["precision"] == "float16",
            accumulative_counts=settings["accumulate"],
            clip_grad={"max_norm": settings["clip_grad"]} if settings["clip_grad"] is not None else None,
        )

    def save_checkpoint(
        self, path: Path, history: list[dict], iteration: int, begun: dict | None = None, complete: bool = True
    ) -> None:
        """Write tensors and plain types only.

        Args:
            path: File.
            history: Entries of the epochs so far.
            iteration: How many batches were trained on.
            begun: What the epoch that isn't complete has measured so far.
            complete: Whether to add what a continuation needs.
        """
        epoch = history[-1]["epoch"] if history else 0
        self.average_statistics()
        gradients = self._pending_gradients() if complete else {}
        checkpoint = {
            "card": self._task.card() | {"epoch": epoch, "metrics": history[-1] if history else {"epoch": 0}},
            "config": plain(self._config),
            "meta": {
                "epoch": epoch,
                "iter": iteration,
                "processes": self.world_size,
                "samples": len(self.train_dataloader.dataset),
                "data": self._data,
            },
            "state_dict": {f"net.{key}": value for key, value in self.net.state_dict().items()},
        }
        if complete:
            checkpoint |= {
                "history": history,
                "begun": begun,
                "damaged": [
                    loader.dataset.damaged.nonzero().flatten().tolist()
                    for loader in (self.train_dataloader, self.val_dataloader)
                ],
                "gradients": gradients,
                "optimizer": self.optim_wrapper.state_dict(),
                "param_schedulers": [scheduler.state_dict() for scheduler in self.param_schedulers],
            }
        if self.module.adapted is not None:
            checkpoint["card"]["lora"] = self.module.adapted
        # The EMA hook exchanges the weights for the averaged ones here, and adds the others.
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        checkpoint["state_dict"] = {
            key.removeprefix("net."): value.cpu()
            for key, value in checkpoint["state_dict"].items()
            if self.module.saved is None or self.module.saved(key.removeprefix("net."))
        }
        if not complete:
            checkpoint.pop("ema_state_dict", None)
        if self.rank == 0:
            save_checkpoint(checkpoint, path)

    def _pending_gradients(self) -> dict[str, Tensor]:
        """Return the gradients that wait for the next step, the mean of all processes'."""
        if not self.optim_wrapper.has_gradients:
            return {}
        gradients = {name: weight.grad for name, weight in self.net.named_parameters() if weight.grad is not None}
        if self.distributed:
            # The processes exchange them at the step only; a continued one starts from one process's file.
            for gradient in gradients.values():
                torch.distributed.all_reduce(gradient)
                gradient /= self.world_size
        return gradients

    def load_or_resume(self) -> None:
        """Load what the run continues from, if it does."""
        with contextlib.nullcontext() if self._load_from is None else taken_as_said(self._load_from):
            super().load_or_resume()

    def load_checkpoint(self, filename: str, map_location="cpu", **kwargs) -> dict:
        """Read a checkpoint of `save_checkpoint` and load its weights, all of them, and what else is ours in it."""
        checkpoint = read_checkpoint(filename, merged=False)
        if self.module.saved is not None:
            if checkpoint["card"]["lora"] != self.module.adapted:
                raise TaskError(
                    f"{filename}: holds adapters of other weights than {self.module.adapted['base']} now has"
                )
            rest = {key: value for key, value in self.net.state_dict().items() if not self.module.saved(key)}
            checkpoint["state_dict"] = rest | checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"net.{key}": value for key, value in checkpoint["state_dict"].items()}
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        state = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}
        load(self.net, state, filename)
        gradients = checkpoint.get("gradients", {})
        for name, weight in self.net.named_parameters():
            weight.grad = gradients[name].to(weight.device) if name in gradients else None
        self.begun = checkpoint.get("begun")
        loaders = (self.train_dataloader, self.val_dataloader)
        for loader, damaged in zip(loaders, checkpoint.get("damaged", ()), strict=False):
            loader.dataset.damaged[damaged] = True
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}
        return checkpoint


def _first_batch(loader: DataLoader, count: int) -> Any:
    """Return the first samples of a data set as a batch."""
    samples = loader.dataset
    batch = [samples[0, place, place] for place in range(min(count, len(samples)))]
    return (loader.collate_fn or default_collate)(batch)


class TrainLoop(EpochBasedTrainLoop):
    """Epochs that may begin in the middle, with a seed of their own for every batch.

    Args:
        iterations: Batches after which the last epoch ends, whole or not.
        *args: mmengine's.
        **kwargs: mmengine's.
    """

    def __init__(self, *args, iterations: int, **kwargs):
        super().__init__(*args, **kwargs)
        self._max_iters = iterations

    def run_epoch(self) -> None:
        """Train on the rest of an epoch."""
        done = self._iter - self._epoch * len(self.dataloader)
        order = self.dataloader.sampler
        order.epoch, order.start = self._epoch, done * self.dataloader.batch_size
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for batch_index, batch in enumerate(self.dataloader, done):
            self.run_iter(batch_index, batch)
            if self._iter == self._max_iters:
                break
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1
