"""The count of tiles against a count of the pairs themselves, and the published cases of GNA."""

import numpy as np
import pytest
from foveate.kernels import neighborhood_cost
from foveate.kernels.neighborhood.window import axis_windows


def visited(length, kernel, stride, dilation, causal, query_tile, key_tile):
    """Count an axis's visits from the windows themselves."""
    windows = axis_windows(length, kernel, dilation, stride, causal)
    counts = []
    for group in range(dilation):
        for start in range(group, length, dilation * query_tile):
            keys = windows[start : start + dilation * query_tile : dilation]
            keys = keys[keys >= 0] // dilation
            counts.append(-(-(keys.max() + 1 - keys.min()) // key_tile))
    return counts


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "kernel", "stride", "dilation"), [(23, 5, 1, 1), (23, 6, 4, 2), (24, 8, 8, 3)])
def test_visits_are_those_of_the_windows(length, kernel, stride, dilation, causal):
    cost = neighborhood_cost((length, 9), (kernel, 3), (stride, 1), (dilation, 2), (4, 2), (3, 2), (causal, False))
    rows = visited(length, kernel, stride, dilation, causal, 4, 3)
    assert (cost.visits == np.multiply.outer(rows, visited(9, 3, 1, 2, False, 2, 2))).all()
    pairs = (axis_windows(length, kernel, dilation, stride, causal) >= 0).sum() * 9 * 3
    assert cost.useful_share == pytest.approx(pairs / (cost.visits.sum() * 4 * 2 * 3 * 2))
    assert cost.speedup_bound == pytest.approx((length * 9) ** 2 / pairs)


@pytest.mark.parametrize(
    ("shape", "window", "stride", "query_tile", "key_tile", "bound"),
    [
        ((256, 256), (80, 80), (16, 16), (16, 16), (16, 8), 10.24),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.11),
    ],
)
def test_published_strides_reach_the_bound(shape, window, stride, query_tile, key_tile, bound):
    cost = neighborhood_cost(shape, window, stride, query_tile=query_tile, key_tile=key_tile)
    assert cost.speedup_bound == pytest.approx(bound, abs=0.005)
    assert cost.speedup == pytest.approx(cost.speedup_bound)
    assert all(step in free for step, free in zip(stride, cost.free_strides, strict=True))
    unstrided = neighborhood_cost(shape, window, query_tile=query_tile, key_tile=key_tile)
    assert unstrided.speedup < 0.8 * bound
    assert cost.speedup_over_stride_1 == pytest.approx(cost.speedup / unstrided.speedup)
    assert not any(1 in free for free in unstrided.free_strides)


def test_our_own_tiles_waste_nothing_at_the_published_strides():
    for shape, window, stride in (((256, 256), 80, 16), ((30, 48, 80), (18, 24, 24), (16, 8, 8))):
        cost = neighborhood_cost(shape, window, stride)
        assert cost.speedup == pytest.approx(cost.speedup_bound)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((5, 5), 7), "does not fit the height"),
        (((5,), 3, 1, 1, (2, 2)), "query_tile as 1 positive integers"),
        (((5,) * 4, 3), "shape of one to three axes"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_cost(*arguments)
