"""Which keys a query sees on one axis. The axes are independent: a neighborhood is the product of its axis windows.

Positions with the same residue modulo the dilation form a group, and a query sees only keys of its own group. Inside
its group the window is centred on the query and shifts at the borders: it never shrinks and nothing is padded.
Sources: NAT (arXiv 2204.07143, eq. 3) and DiNAT (arXiv 2209.15001, eq. 4), as implemented by NATTEN.
"""

import numpy as np


def axis_windows(length: int, kernel_size: int, dilation: int = 1) -> np.ndarray:
    """Return the key positions that each query of an axis attends to.

    Args:
        length: Positions on the axis; at least ``kernel_size * dilation``.
        kernel_size: Keys per query. An even window has one key more to the left than to the right.
        dilation: Distance between neighboring keys.

    Returns:
        ``[length, kernel_size]`` int64 array of ascending key positions.
    """
    query = np.arange(length)
    group, rank = query % dilation, query // dilation
    group_length = (length - group + dilation - 1) // dilation
    first = np.clip(rank - kernel_size // 2, 0, group_length - kernel_size)
    return group[:, None] + dilation * (first[:, None] + np.arange(kernel_size))


def axis_offsets(length: int, kernel_size: int, dilation: int = 1) -> np.ndarray:
    """Return the relative-position index of every query-key pair of an axis.

    The index is the distance from query to key in steps of the dilation, plus ``kernel_size - 1``, so that it runs
    from 0 to ``2 * kernel_size - 2`` and the query's own position has the middle one.

    Returns:
        ``[length, kernel_size]`` int64 array, parallel to `axis_windows`.
    """
    distance = axis_windows(length, kernel_size, dilation) - np.arange(length)[:, None]
    return distance // dilation + kernel_size - 1
