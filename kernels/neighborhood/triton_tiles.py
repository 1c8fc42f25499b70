"""How the Triton kernels cut their problem: tiles of positions that a program owns, boxes that it walks over."""

import functools
import itertools
import math
from typing import NamedTuple

from ..triton_launch import TileSize, power_of_two, size_for
from .cost import axis_visits
from .window import Axis


class Shape(NamedTuple):
    """How a kernel cuts its problem. All lengths are powers of two."""

    tile: tuple[int, int, int]  # positions of a program
    box: tuple[int, int, int]  # positions of the other side that are loaded at a time
    warps: int
    stages: int


# By kernel and by what it multiplies. Up to 256 bytes these are the fastest of the sizes tried on an H200; beyond, they
# keep accumulators in registers and boxes in half the smallest shared memory.
SIZES: dict[tuple[str, str], list[TileSize]] = {
    ("forward", "half"): [
        TileSize(64, 64, 64, 4, 2, registers_free=True),
        TileSize(64, 64, 32, 4, 2),
        TileSize(256, 64, 64, 4, 3, registers_free=True),
        TileSize(256, 64, 32, 4, 3),
        TileSize(512, 64, 32, 8, 2),
        TileSize(2048, 16, 16, 4, 1),
    ],
    # The addresses of a bias take registers.
    ("forward", "half, biased"): [
        TileSize(128, 64, 32, 4, 2),
        TileSize(256, 64, 32, 4, 3),
        TileSize(512, 64, 32, 8, 2),
        TileSize(2048, 16, 16, 4, 1),
    ],
    ("backward_query", "half"): [
        TileSize(64, 64, 64, 4, 2, registers_free=True),
        TileSize(64, 64, 32, 4, 2),
        TileSize(128, 64, 32, 4, 3),
        TileSize(256, 64, 64, 4, 2, registers_free=True),
        TileSize(256, 64, 32, 8, 2),
        TileSize(512, 32, 16, 4, 1),
        TileSize(2048, 16, 16, 4, 1),
    ],
    ("backward_query", "half, biased"): [
        TileSize(64, 64, 32, 4, 1),
        TileSize(128, 64, 32, 4, 3),
        TileSize(256, 64, 32, 8, 2),
        TileSize(512, 32, 16, 4, 1),
        TileSize(2048, 16, 16, 4, 1),
    ],
    ("backward_key_value", "half"): [
        TileSize(64, 64, 32, 4, 2),
        TileSize(128, 64, 64, 4, 2, registers_free=True),
        TileSize(128, 64, 32, 4, 2),
        TileSize(256, 64, 32, 4, 2, registers_free=True),
        TileSize(256, 64, 32, 8, 2),
        TileSize(512, 32, 16, 4, 1),
        TileSize(2048, 16, 16, 4, 1),
    ],
    ("backward_key_value", "half, biased"): [
        TileSize(64, 64, 16, 4, 2),
        TileSize(128, 64, 32, 4, 2, registers_free=True),
        TileSize(256, 64, 32, 8, 2),
        TileSize(512, 32, 16, 4, 1),
        TileSize(2048, 16, 16, 4, 1),
    ],
    # IEEE float32 products run on the plain cores, whose operands take registers.
    ("forward", "float32"): [
        TileSize(256, 32, 32, 4, 2),
        TileSize(512, 32, 16, 4, 2),
        TileSize(2048, 16, 16, 4, 1),
    ],
    ("backward_query", "float32"): [
        TileSize(128, 32, 32, 4, 1),
        TileSize(256, 32, 32, 4, 3),
        TileSize(512, 32, 16, 8, 1),
        TileSize(2048, 16, 16, 4, 1),
    ],
    ("backward_key_value", "float32"): [
        TileSize(256, 32, 32, 4, 1),
        TileSize(512, 32, 16, 8, 1),
        TileSize(2048, 16, 16, 4, 1),
    ],
}
SIZES |= {(kernel, "float32, biased"): sizes for (kernel, kind), sizes in SIZES.items() if kind == "float32"}
# Nothing limits the interpreter.
INTERPRETED = TileSize(2048, 64, 32, 1, 1)
# The major compute capabilities whose matrix products leave their operands in shared memory.
_REGISTERS_FREE = (9, 10, 11)


def _factorings(size: int, longest: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return how a power of two factors into three powers of two, none longer than needed."""
    powers = [[1 << i for i in range(size.bit_length()) if 1 << i < 2 * length] for length in longest]
    exact = [sizes for sizes in itertools.product(*powers) if math.prod(sizes) == size]
    # A small map does not fill a tile; its last axis is padded.
    return exact or [(*sizes[:2], size // (sizes[0] * sizes[1])) for sizes in itertools.product(*powers[:2], [1])]


@functools.lru_cache(maxsize=1024)
def kernel_shape(kernel: str, axes: tuple[Axis, ...], row_bytes: int, biased: bool, target: str, major: int) -> Shape:
    """Return the tile and the box of a kernel: of its size, those that cost least by a count of pairs and loads.

    Args:
        kernel: "forward", "backward_query" or "backward_key_value".
        axes: Three axes.
        row_bytes: Bytes of a key or value vector, the longer one, padded to a power of two.
        biased: Whether a bias is read for every pair.
        target: "float32", "half" or "interpreted".
        major: Of the GPU's compute capability; 0 for GPUs of other makers.
    """
    size = INTERPRETED
    if target != "interpreted":
        size = size_for(SIZES[kernel, target + ", biased" * biased], row_bytes, major in _REGISTERS_FREE)
    lengths = tuple(-(-axis.length // axis.dilation) for axis in axes)

    def cost(shape: Shape) -> tuple:
        visits = tiles = 1
        for axis, tile, box in zip(axes, shape.tile, shape.box, strict=True):
            axis_boxes = axis_visits(axis, tile, box)
            tiles *= len(axis_boxes)
            visits *= int(axis_boxes.sum())
        pairs = size.own * size.walked
        if biased and kernel == "backward_query":  # the rows of a box are skewed to the columns of the bias
            pairs += size.own * shape.box[0] * shape.box[1] * power_of_two(2 * axes[2].kernel_size - 1)
        # In units of a pair's softmax: a key and its value move as slowly as 20 of them for 64 bytes.
        work = visits * (pairs + 20 * size.walked * row_bytes // 64 + 512) + tiles * 2048
        return work, -shape.box[2], -shape.tile[2], shape

    shapes = [
        Shape(tile, box, size.warps, size.stages)
        for tile in _factorings(size.own, lengths)
        for box in _factorings(size.walked, lengths)
    ]
    shape = min(shapes, key=cost)
    if major == 10 and not biased and row_bytes <= 64:
        # For narrow heads without bias on sm_100, ptxas spills to reach an occupancy that a further stage rules out.
        shape = shape._replace(stages=shape.stages + 1)
    return shape
