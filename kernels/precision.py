"""Operations whose precision autocast must not lower."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager:
    """Return a context in which autocast leaves the precision of operations on ``x``'s device alone."""
    device = x.device.type
    # Autocast doesn't know the meta device; to ask whether it knows one breaks graphs before torch 2.9.
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
