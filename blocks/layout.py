"""The order of maps in memory."""

from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """Return ``x`` ``[B, C, H, W]``, or a copy of it, with the channels last in memory.

    As `torch.channels_last` has it, but said so that `torch.vmap` and traced graphs understand.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
