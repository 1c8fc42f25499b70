"""Masks of objects: what a mask head learns, and how its maps are laid into an image."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align


def crop_masks(masks: Tensor, boxes: Tensor, indices: Tensor, size: int) -> Tensor:
    """Cut what boxes see out of masks: the goals of a mask head.

    Args:
        masks: Masks ``[M, H, W]`` of an image's objects, on the padded canvas of the batch.
        boxes: Boxes ``[N, 4]``; they are clipped to the canvas.
        indices: Which mask each box sees, ``[N]``.
        size: Side of the result.

    Returns:
        Goals ``[N, size, size]``, 0 or 1 in float32.
    """
    if len(boxes) == 0:
        return boxes.new_zeros(0, size, size)
    height, width = masks.shape[-2:]
    limits = boxes.new_tensor([width, height, width, height])
    rois = torch.cat([indices[:, None].to(boxes), torch.minimum(boxes.clamp(min=0), limits)], dim=1)
    # An object that no box sees costs nothing, but its mask need not become floating point.
    used, rois[:, 0] = indices.unique(return_inverse=True)
    values = roi_align(masks[used, None].float(), rois, size, spatial_scale=1.0, sampling_ratio=-1, aligned=True)
    return (values.squeeze(1) >= 0.5).float()


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float | None = 0.5) -> Tensor:
    """Lay a mask head's maps into an image by bilinear interpolation at the pixels' centres.

    Args:
        masks: Probabilities ``[N, S, S]``.
        boxes: Boxes ``[N, 4]`` of the maps, in pixels of the image.
        image_size: ``(height, width)`` of the image.
        threshold: Least probability of a pixel of the mask; None returns the probabilities.

    Returns:
        Masks ``[N, height, width]``, bool, or float32 where there is no threshold.
    """
    height, width = image_size
    dtype = torch.float32 if threshold is None else torch.bool
    pasted = torch.zeros(len(masks), height, width, dtype=dtype, device=masks.device)
    # Interpolation against zeros reaches half a cell of the map beyond the box.
    reach = (boxes[:, 2:] - boxes[:, :2]) / (2 * masks.shape[-1])
    low = ((boxes[:, :2] - reach).floor() - 1).clamp(min=0).long().tolist()
    high = ((boxes[:, 2:] + reach).ceil() + 1).long().tolist()
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        (left, top), (right, bottom) = low[index], high[index]
        right, bottom = min(right, width), min(bottom, height)
        if right <= left or bottom <= top:
            continue
        x = _positions(left, right, x1, x2)
        y = _positions(top, bottom, y1, y2)
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        values = F.grid_sample(masks[index, None, None].float(), grid[None], align_corners=False)[0, 0]
        pasted[index, top:bottom, left:right] = values if threshold is None else values >= threshold
    return pasted


def _positions(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    pixels = torch.arange(start, stop, dtype=torch.float32, device=low.device) + 0.5
    positions = (pixels - low) / (high - low) * 2 - 1
    # Of a box without extent, every pixel shows the middle.
    return torch.where(positions.isfinite(), positions, 0.0)
