"""How the Triton kernels cut their problem: tiles of positions that a program owns, boxes that it walks over."""

import functools
import itertools
import math
from typing import NamedTuple

from ..triton_launch import TileSize, power_of_two, sizes_for
from .window import Axis


class Shape(NamedTuple):
    """How a kernel cuts its problem. All lengths are powers of two."""

    tile: tuple[int, int, int]  # positions of a program
    box: tuple[int, int, int]  # positions of the other side that are loaded at a time
    warps: int
    stages: int


# No GPU chose these sizes: they keep accumulators in registers and boxes in half the smallest shared memory.
# Where several rows are for one length, `kernel_shape` counts which costs least.
SIZES: dict[tuple[str, str], list[TileSize]] = {
    ("forward", "half"): [
        TileSize(128, 64, 32, 4, 3),
        TileSize(128, 64, 64, 4, 3),
        TileSize(128, 128, 32, 8, 3),
        TileSize(128, 128, 64, 8, 3),
        TileSize(256, 64, 32, 4, 3),
        TileSize(256, 64, 32, 8, 3),
        TileSize(256, 128, 32, 8, 2),
        TileSize(256, 128, 64, 8, 2),
        TileSize(512, 64, 32, 8, 2),
        TileSize(2048, 16, 16, 4, 1),
    ],
    ("backward", "half"): [
        TileSize(64, 64, 32, 4, 2),
        TileSize(128, 64, 32, 8, 2),
        TileSize(256, 64, 32, 8, 2),
        TileSize(512, 32, 16, 4, 1),
        TileSize(2048, 16, 16, 4, 1),
    ],
    # IEEE float32 products run on the plain cores, whose operands take registers.
    ("forward", "float32"): [
        TileSize(128, 32, 32, 4, 2),
        TileSize(128, 64, 32, 8, 2),
        TileSize(256, 32, 32, 4, 2),
        TileSize(512, 32, 16, 4, 2),
        TileSize(2048, 16, 16, 4, 1),
    ],
    ("backward", "float32"): [
        TileSize(128, 32, 16, 4, 2),
        TileSize(256, 32, 16, 8, 2),
        TileSize(512, 32, 16, 8, 1),
        TileSize(2048, 16, 16, 4, 1),
    ],
    ("forward", "interpreted"): [TileSize(2048, 64, 32, 1, 1)],
    ("backward", "interpreted"): [TileSize(2048, 64, 32, 1, 1)],
}
# Other chips hold the operands of matrix products in registers, too.
_OPERANDS_IN_SHARED_MEMORY = (9, 10, 11)


def _factorings(size: int, longest: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return how a power of two factors into three powers of two, none longer than needed."""
    powers = [[1 << i for i in range(size.bit_length()) if 1 << i < 2 * length] for length in longest]
    exact = [sizes for sizes in itertools.product(*powers) if math.prod(sizes) == size]
    # A small map does not fill a tile; its last axis is padded.
    return exact or [(*sizes[:2], size // (sizes[0] * sizes[1])) for sizes in itertools.product(*powers[:2], [1])]


@functools.lru_cache(maxsize=1024)
def kernel_shape(
    pass_name: str, axes: tuple[Axis, ...], row_bytes: int, biased: bool, target: str, major: int
) -> Shape:
    """Choose the tile and the box that cost least, by a count of pairs and loads.

    Args:
        pass_name: "forward" or "backward".
        axes: Three axes.
        row_bytes: Bytes of a key or value vector, the longer one, padded to a power of two.
        biased: Whether a bias is read for every pair; its addresses take registers.
        target: "float32", "half" or "interpreted".
        major: Of the GPU's compute capability; 0 for GPUs of other makers.
    """
    lengths = tuple(-(-axis.length // axis.dilation) for axis in axes)

    def cost(shape: Shape) -> tuple:
        boxes = tiles = 1
        for n, axis, tile, box in zip(lengths, axes, shape.tile, shape.box, strict=True):
            seen = min(n, -(-tile // axis.stride) * axis.stride + axis.kernel_size - 1)
            tiles *= -(-n // tile)
            boxes *= -(-seen // box)
        positions, keys = math.prod(shape.tile), math.prod(shape.box)
        pairs = positions * keys
        if biased and pass_name == "backward":  # the rows of a box are skewed to the columns of the bias
            pairs += positions * shape.box[0] * shape.box[1] * power_of_two(2 * axes[2].kernel_size - 1)
        # In units of a pair's softmax: a key and its value move as slowly as 20 of them for 64 bytes.
        work = tiles * (boxes * (pairs + 20 * keys * row_bytes // 64 + 512) + 2048)
        return work, -shape.box[2], -shape.tile[2], shape

    shapes = [
        Shape(tile, box, warps, stages)
        for _, m, n, warps, stages in sizes_for(SIZES[pass_name, target], row_bytes)
        if target == "interpreted"
        or m * n <= (512 if biased or major not in _OPERANDS_IN_SHARED_MEMORY else 1024) * warps
        for tile in _factorings(m, lengths)
        for box in _factorings(n, lengths)
    ]
    shape = min(shapes, key=cost)
    if major == 10 and not biased and row_bytes <= 64:
        # For narrow heads without bias on sm_100, ptxas spills to reach an occupancy that a further stage rules out.
        shape = shape._replace(stages=shape.stages + 1)
    return shape
