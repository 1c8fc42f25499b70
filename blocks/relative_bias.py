"""Bias by relative position: its table, laid out for the pairs of a map, and resampled for maps of another size."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor


@register_notrace_function
def relative_bias(rpb: Tensor, height: int, width: int) -> Tensor:
    """Return the bias ``[heads, H * W, H * W]`` of the queries and keys of a map, in row-major order.

    The table ``[heads, 2 * H - 1, 2 * W - 1]`` is laid out as in neighborhood attention: entry
    ``[h, y + H - 1, x + W - 1]`` belongs to a key that lies ``y`` rows below and ``x`` columns to the right of the
    query. Swin's table is this one, flipped along both axes.
    """
    y, x = torch.arange(height, device=rpb.device), torch.arange(width, device=rpb.device)
    rows = y[None, :] - y[:, None] + height - 1
    columns = x[None, :] - x[:, None] + width - 1
    index = rows[:, None, :, None] * (2 * width - 1) + columns[None, :, None, :]
    return rpb.flatten(1).index_select(1, index.flatten()).unflatten(1, (height * width, height * width))


def resize_bias_table(table: Tensor, size: list[int]) -> Tensor:
    """Resample a bias table ``[heads, h, w]`` to ``(h, w)``, bicubic as the NAT authors did from kernel 7 to 11."""
    exact = table if table.dtype == torch.float64 else table.float()
    resized = F.interpolate(exact[None], size=size, mode="bicubic", align_corners=False)
    return resized[0].to(table.dtype)
