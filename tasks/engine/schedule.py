"""How long a run lasts, and its learning rate on the way."""

import math
import os
import sys

from mmengine.optim import CosineAnnealingLR, LinearLR, MultiStepLR, PolyLR

from .. import TaskError


def learning_rate(config: dict) -> float:
    """Return the learning rate, which grows in proportion to the images of a step where ``lr_batch`` names a number.

    All processes' images count, and those of accumulated batches (arXiv 1706.02677).
    """
    optimizer = config["optimizer"]
    if optimizer["lr_batch"] is None:
        return optimizer["lr"]
    images = config["batch_size"] * optimizer["accumulate"] * int(os.environ.get("WORLD_SIZE", "1"))
    return optimizer["lr"] * images / optimizer["lr_batch"]


def count_epochs(config: dict, batches: int) -> int:
    """Return for how many epochs of ``batches`` a run lasts.

    Raises:
        TaskError: If there are no batches, or a schedule of steps ends before its warmup does.
    """
    if batches == 0:
        raise TaskError("the training set is empty")
    epochs = config["epochs"] if config["iterations"] is None else math.ceil(config["iterations"] / batches)
    # It can be extended, and then its warmup would be another one.
    if config["schedule"]["name"] == "step" and (fault := _excess(config, epochs, batches)):
        raise TaskError(f"{fault}; lower it, or raise epochs (now {epochs})")
    return epochs


def remark_on_warmup(config: dict, epochs: int, batches: int) -> list[str]:
    """Return what is to be said of a warmup that is shorter than the config's."""
    fault = _excess(config, epochs, batches)
    return [f"{fault}: it takes {count_warmup(config, epochs, batches)}"] if fault else []


def count_warmup(config: dict, epochs: int, batches: int) -> int:
    """Return on how many batches the learning rate grows: a fifth of the run's, if those asked for would fill it."""
    warmup, total = _asked_warmup(config, batches), count_iterations(config, epochs, batches)
    return warmup if warmup < total else total // 5


def _asked_warmup(config: dict, batches: int) -> int:
    return config["schedule"]["warmup_iterations"] + config["schedule"]["warmup_epochs"] * batches


def _excess(config: dict, epochs: int, batches: int) -> str | None:
    """Return how a warmup is as long as the run; None if it is shorter."""
    warmup, total = _asked_warmup(config, batches), count_iterations(config, epochs, batches)
    if warmup < total:
        return None
    name = "warmup_iterations" if config["schedule"]["warmup_iterations"] else "warmup_epochs"
    asked = f"schedule.{name}={config['schedule'][name]}"
    return f"the warmup of {warmup} batches ({asked}) must be shorter than the run, which has {total}"


def count_iterations(config: dict, epochs: int, batches: int) -> int:
    """Return on how many batches a run of so many epochs trains; the last epoch ends where ``iterations`` do."""
    return epochs * batches if config["iterations"] is None else config["iterations"]


def build_schedulers(config: dict, epochs: int, batches: int) -> list[dict]:
    """Return a linear warmup and the schedule, by iterations."""
    schedule, total = config["schedule"], count_iterations(config, epochs, batches)
    warmup = count_warmup(config, epochs, batches)
    span = {"begin": warmup, "end": total, "by_epoch": False}
    if schedule["name"] == "step":
        steps = [step * batches for step in schedule["steps"]]
        # Without an end, so that a run with steps can be extended.
        span = {"begin": 0, "end": sys.maxsize, "by_epoch": False}
        after = {"type": MultiStepLR, "milestones": steps, "gamma": schedule["gamma"], **span}
    elif schedule["name"] == "poly":
        least = schedule["final_factor"] * learning_rate(config)
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
