"""Multi-scale deformable attention of torch's gathers and sums alone, which have derivatives of any order."""

from collections.abc import Sequence

from torch import Tensor

from .bilinear import gather_bilinear


def deformable_gathers(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Gather the four pixels around the points of each map, then sum over these."""
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    locations, weights = (x.transpose(1, 2).flatten(0, 1) for x in (locations, weights))
    out = value.new_zeros(batch * heads, queries, dim)
    for level, (pixels, (height, width)) in enumerate(
        zip(value.split([height * width for height, width in shapes], dim=1), shapes, strict=True)
    ):
        image = pixels.transpose(1, 2).reshape(batch * heads, height, width, dim)
        x, y = locations[:, :, level].flatten(1, 2).unbind(-1)
        samples = gather_bilinear(image, y * height - 0.5, x * width - 0.5).unflatten(1, (queries, points))
        out = out + (samples * weights[:, :, level, :, None]).sum(2)
    return out.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)
