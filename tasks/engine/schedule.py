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
    """Return for how many epochs of ``batches`` a run lasts, or raise a TaskError if its warmup doesn't fit."""
    if batches == 0:
        raise TaskError("the training set is empty")
    epochs = config["epochs"] if config["iterations"] is None else math.ceil(config["iterations"] / batches)
    schedule = config["schedule"]
    warmup = schedule["warmup_iterations"] + schedule["warmup_epochs"] * batches
    total = count_iterations(config, epochs, batches)
    if warmup >= total:
        key = "schedule.warmup_iterations" if schedule["warmup_iterations"] else "schedule.warmup_epochs"
        raise TaskError(
            f"the warmup of {warmup} batches ({key}={schedule[key.partition('.')[2]]}) must be shorter than the run, "
            f"which has {total}; lower it, or raise epochs (now {epochs})"
        )
    return epochs


def count_iterations(config: dict, epochs: int, batches: int) -> int:
    """Return on how many batches a run of so many epochs trains; the last epoch ends where ``iterations`` do."""
    return epochs * batches if config["iterations"] is None else config["iterations"]


def build_schedulers(config: dict, epochs: int, batches: int) -> list[dict]:
    """Return a linear warmup and the schedule, by iterations."""
    schedule, total = config["schedule"], count_iterations(config, epochs, batches)
    warmup = schedule["warmup_iterations"] + schedule["warmup_epochs"] * batches
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
