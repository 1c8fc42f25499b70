"""Masks of objects: what a mask head learns, and how its maps are laid into an image."""

import torch
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
