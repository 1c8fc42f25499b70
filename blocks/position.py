"""Position embeddings of maps."""

import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor


@register_notrace_function
def resize_map(table: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Resample a position embedding ``[1, h, w, C]`` to a map's size."""
    if table.shape[1] == height and table.shape[2] == width:
        return table
    table = F.interpolate(table.permute(0, 3, 1, 2), size=[height, width], mode=mode, align_corners=False)
    return table.permute(0, 2, 3, 1)
