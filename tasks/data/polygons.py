"""Masks as polygons, for formats that hold no run lengths."""

from collections.abc import Sequence

import numpy as np


def trace_mask(mask: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Return the outlines of a mask's parts along the edges of its pixels, and how many holes they don't tell.

    Args:
        mask: ``[H, W]``, of 0 and 1.

    Returns:
        Polygons, float64, ``x1, y1, x2, y2, ...`` in pixels, the largest first; the number of holes.
    """
    import cv2

    # OpenCV's outlines run through the middle of pixels: of pixels twice as fine, each edge is beside one.
    fine = np.kron(np.asarray(mask, np.uint8), np.ones((2, 2), np.uint8))
    outlines, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return [], 0
    outer = hierarchy[0, :, 3] < 0
    polygons = [
        _corners((outline[:, 0] + 1) // 2) for outline, is_outer in zip(outlines, outer, strict=True) if is_outer
    ]
    polygons = sorted((polygon for polygon in polygons if len(polygon) >= 3), key=_area, reverse=True)
    return [polygon.astype(np.float64).ravel() for polygon in polygons], int((~outer).sum())


def _corners(points: np.ndarray) -> np.ndarray:
    """Return the points ``[N, 2]`` of an outline at which it turns."""
    points = points[(points != np.roll(points, 1, 0)).any(1)]
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    return points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _area(points: np.ndarray) -> float:
    x, y = points.T.astype(np.float64)
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def join_polygons(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """Return polygons as one: each further one is reached, and left, by a line between the nearest two corners."""
    joined = np.asarray(polygons[0], np.float64).reshape(-1, 2)
    for polygon in polygons[1:]:
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        distances = ((joined[:, None] - points) ** 2).sum(-1)
        here, there = np.unravel_index(distances.argmin(), distances.shape)
        turned = np.roll(points, -there, 0)
        joined = np.concatenate([joined[: here + 1], turned, turned[:1], joined[here:]])
    return joined.ravel()
