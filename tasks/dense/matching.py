"""Matching predicted sets to objects, one to one, and counting objects over processes."""

import torch
import torch.distributed as dist
from torch import Tensor

from .. import TaskError
from ..extras import require


def match_cheapest(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs of the cheapest matching for costs ``[queries, objects]``, in the order of the queries.

    Raises:
        TaskError: If a cost is not finite.
    """
    if not cost.isfinite().all():
        raise TaskError("the predictions are not finite, training has diverged; try a lower optimizer.lr")
    pairs = require("scipy.optimize").linear_sum_assignment(cost.cpu().numpy())
    return tuple(torch.as_tensor(index, device=cost.device) for index in pairs)


def mean_count(count: int, device: torch.device) -> Tensor:
    """Return a number of objects as the mean over processes, at least 1, by which to divide losses."""
    mean = torch.tensor(float(count), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.clamp(min=1.0)
