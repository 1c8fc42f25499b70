"""Whether what was written computes what the model computes: other images, other sizes, ties allowed to swap."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .. import TaskError
from .modules import example_images

# Share of the elements of labels and masks that may fall on the other side of an edge, where two scores all but agree.
EDGE = 1e-4
# Where rounding in float32 is what differs, this many tolerances are accepted at most.
LOOSEST = 10


def check_inputs(example: Tensor, dynamic_batch: bool, dynamic_size: bool) -> Iterator[Tensor]:
    """Yield the images that an exported model is tried on: those of its example, others, other sizes, other batches.

    Args:
        example: Images ``[B, C, H, W]``.
        dynamic_batch: Whether it takes any number of images.
        dynamic_size: Whether it takes images of any size; then three are tried, two of them of odd sides.
    """
    batch, channels, height, width = example.shape
    # A second input finds what was taken for a constant.
    yield example
    shapes = [(height, width)]
    if dynamic_size:
        shapes = [(height + height // 5 | 1, width + width // 3 | 1), (height + height // 3 | 1, max(width - 7, 1) | 1)]
    for index, (rows, columns) in enumerate(shapes):
        count = batch + 2 if dynamic_batch and index == 0 else batch
        yield example_images(channels, rows, columns, count, seed=index + 1)


def as_list(output: object) -> list[Tensor]:
    """Return what a model returned as a list of tensors.

    Raises:
        TaskError: If it isn't tensors.
    """
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list) and all(isinstance(value, Tensor) for value in output):
        return list(output)
    raise TaskError(f"the model returns {type(output).__name__}, not tensors; --features exports its feature maps")


def differences(model: nn.Module, got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> list[float]:
    """Return how far each output is from what was expected, in units of its standard deviation.

    Of labels, masks and counts it is 0 if they agree, but for `EDGE` of large ones and a pixel of small maps, and else
    infinite. Detections, the outputs of a model that names ``scores`` and ``count`` among its ``OUTPUTS``, are compared
    by the order of scores.

    Args:
        model: Has perhaps ``OUTPUTS``.
        got: Outputs.
        expected: Outputs.
        tolerance: Detections whose scores differ by less, in units of the highest, may swap.
    """
    names = list(getattr(model, "OUTPUTS", ()))
    if "boxes" in names:
        got = list(aligned(dict(zip(names, got, strict=True)), dict(zip(names, expected, strict=True)), tolerance))
    apart = [_difference(one, other) for one, other in zip(got, expected, strict=True)]
    if {"segments", "areas"} <= {*names}:
        # Pixels that may fall on the other side of an edge are counted in areas too.
        segments, areas = names.index("segments"), names.index("areas")
        same = got[areas].shape == expected[areas].shape
        if same and (got[areas] - expected[areas]).abs().max() <= _on_edges(expected[segments]):
            apart[areas] = 0.0
    return apart


def accepted(model: nn.Module, images: Tensor, expected: Sequence[Tensor], tolerance: float) -> list[float]:
    """Return how far each output may be from what was expected: the tolerance, or what its type leaves open.

    The model's answer in float32 and the file's are both rounded, each about as far from the exact one as the other, so
    that they may be twice as far apart as the model's is from its own in float64. More than `LOOSEST` tolerances is
    never accepted; of a model that says by ``rounding`` how much coarser its type is than float32, more than as many.
    Scores, which are shares of 1, may differ by what float32 tells apart there: onnxruntime's Sigmoid is no closer.

    Args:
        model: What was exported.
        images: What it answered.
        expected: Its answer.
        tolerance: See above.
    """
    try:
        exact = _exact(model, images)
        exact = [value.to(like.dtype) for value, like in zip(exact, expected, strict=True)]
        rounding = differences(model, expected, exact, LOOSEST * tolerance)
    except (RuntimeError, TypeError, ValueError):
        rounding = [0.0] * len(expected)
    names = list(getattr(model, "OUTPUTS", ()))
    if "scores" in names:
        index, step = names.index("scores"), torch.finfo(torch.float32).eps
        rounding[index] = max(rounding[index], step / 2 / _spread(expected[index]))
    most = tolerance * max(LOOSEST, getattr(model, "rounding", 1))
    return [min(max(tolerance, 2 * value), most) for value in rounding]


def _exact(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return a model's answer in float64; of one that stays in float32 that to images whose last digits differ."""
    with torch.no_grad():
        try:
            return as_list(copy.deepcopy(model).double()(images.double()))
        except TaskError:
            step = torch.finfo(torch.float32).eps * example_images(*images.shape[1:], len(images), seed=1).sign()
            return as_list(model(images * (1 + step)))


def _on_edges(expected: Tensor) -> float:
    """Return how many elements may differ: of maps of pixels, a small one's too, one at least."""
    return max(int(expected.ndim > 2), EDGE * expected.numel())


def _difference(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        wrong = int((got != expected).sum())
        return 0.0 if wrong <= _on_edges(expected) else float("inf")
    # NaN is no agreement.
    difference = (got - expected).abs().max().item() / _spread(expected)
    return difference if difference == difference else float("inf")


def _spread(expected: Tensor) -> float:
    """Return the standard deviation of an output; of one that is all but alike a share of its size."""
    spread = expected.std().item() if expected.numel() > 1 else 0.0
    # Float32 has no more digits than this share.
    return max(spread, 0.05 * expected.abs().max().item()) or 1.0


def aligned(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> Iterator[Tensor]:
    """Yield what was found in the order of what was expected: detections of all but equal scores may swap.

    Args:
        got: ``boxes`` ``[B, D, 4]``, ``scores``, ``labels`` ``[B, D]``, and others, whose second axis is D.
        expected: The same.
        tolerance: Most difference of scores that may swap, as a share of the highest.
    """
    near = (got["scores"][:, None] - expected["scores"][:, :, None]).abs() <= tolerance * expected["scores"].max()
    apart = (got["boxes"][:, None] - expected["boxes"][:, :, None]).abs().amax(-1)
    apart = apart / expected["boxes"].abs().max().clamp(min=1e-12)
    apart = apart + (got["labels"][:, None] != expected["labels"][:, :, None])
    if "masks" in got:
        # Several objects may fill the same box, such as the whole image.
        apart = apart + _masks_apart(got["masks"], expected["masks"])
    # What has no counterpart of its score stands for itself, so that the difference told is that of the scores.
    own = torch.arange(near.shape[-1]).expand(near.shape[:-1])
    place = torch.where(near.any(-1), apart.masked_fill(~near, float("inf")).argmin(-1), own)
    for value in got.values():
        if value.ndim == 1:
            yield value
        else:
            index = place.view(*place.shape, *(1,) * (value.ndim - 2)).expand(-1, -1, *value.shape[2:])
            yield value.gather(1, index)


def _masks_apart(got: Tensor, expected: Tensor) -> Tensor:
    """Return the share of pixels in which each mask expected ``[B, D, H, W]`` differs from each one got: [B, D, D]."""
    got, expected = got.flatten(2).float(), expected.flatten(2).float()
    areas = got.sum(2)[:, None] + expected.sum(2)[:, :, None]
    return (areas - 2 * expected @ got.mT) / got.shape[2]
