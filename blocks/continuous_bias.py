"""Position bias from an MLP on logarithms of distances (Swin V2, arXiv 2111.09883; TransNeXt, arXiv 2311.17132)."""

import functools
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.backends import exporting, transform_obstacle
from .plain import is_plain

# Hidden numbers of the MLP at once, where they are not kept for gradients: 8 MB in float32.
_HIDDEN = 2**21


class AxisTable(NamedTuple):
    """One axis of a bias: the distances that occur, and which of them, weighted, a pair of positions has.

    Attributes:
        distances: Query minus key, each once, in positions, ``[S]``.
        index: Entries of ``distances`` of each query and key, ``[n, m, terms]``.
        weight: Their weights, which add up to 1, ``[n, m, terms]``.
    """

    distances: Tensor
    index: Tensor
    weight: Tensor


def bin_centers(length: int, bins: int) -> np.ndarray:
    """Return the mean position in each bin of adaptive average pooling of a line, ``[bins]``."""
    bin_ = np.arange(bins)
    first, last = bin_ * length // bins, -(-(bin_ + 1) * length // bins) - 1
    return (first + last) / 2


@torch.compiler.allow_in_graph
def pooling_matrix(length: int, bins: int) -> Tensor:
    """Return the matrix ``[bins, length]`` of adaptive average pooling of a line, float32."""
    length, bins = int(length), int(bins)
    position, bin_ = np.arange(length), np.arange(bins)[:, None]
    inside = (position >= bin_ * length // bins) & (position < -(-(bin_ + 1) * length // bins))
    return torch.tensor((inside / inside.sum(1, keepdims=True)).astype(np.float32))


def _neighbors(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions ``[target, 2]`` that bilinear resizing reads, and their weights; one each if none is."""
    if source == target:
        return np.arange(target)[:, None], np.ones((target, 1))
    at = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    low = at.astype(np.int64)
    part = at - low
    return np.stack([low, np.minimum(low + 1, source - 1)], 1), np.stack([1 - part, part], 1)


@functools.lru_cache(maxsize=256)
def _axis_arrays(queries: int, keys: int, trained_queries: int, trained_keys: int) -> tuple[np.ndarray, ...]:
    difference = np.arange(trained_queries)[:, None] - bin_centers(trained_queries, trained_keys)[None]
    distances, index = np.unique(difference, return_inverse=True)
    index = index.reshape(difference.shape)
    query, query_weight = _neighbors(trained_queries, queries)
    key, key_weight = _neighbors(trained_keys, keys)
    index = index[query[:, None, :, None], key[None, :, None, :]].reshape(queries, keys, -1)
    weight = (query_weight[:, None, :, None] * key_weight[None, :, None, :]).reshape(queries, keys, -1)
    return distances, index, weight


# A compiler would else trace it operation by operation, and stop at those whose results have sizes of their own.
@torch.compiler.allow_in_graph
def axis_table(queries: int, keys: int, trained_queries: int, trained_keys: int) -> AxisTable:
    """Return the table of an axis of so many queries and pooled keys.

    Where the trained numbers are others, its bias is the trained axis's, resized as two bilinear interpolations do
    (one over keys, one over queries, without aligned corners).
    """
    # Arrays are kept, not tensors: one made in inference mode could be used in no training.
    return AxisTable(*map(torch.tensor, _axis_arrays(*map(int, (queries, keys, trained_queries, trained_keys)))))


def _same(cached: Tensor, weight: Tensor) -> bool:
    return cached.dtype == weight.dtype and cached.device == weight.device and torch.equal(cached, weight)


class ContinuousBias(nn.Module):
    """The bias of a map's queries to the keys of a pooled map, by the logarithm of their distance along each axis.

    The MLP sees each distance that occurs on an axis once, with each of the other axis: a few thousand pairs, where
    queries times keys are millions.

    Args:
        num_heads: Attention heads.
        pretrain_size: Height and width of the maps that the weights were trained on, which distances are measured in.
        trained_size: Height and width of maps whose biases are resized for others; None to compute those of any map.
        hidden: Hidden channels of the MLP.
    """

    def __init__(
        self,
        num_heads: int,
        pretrain_size: tuple[int, int],
        trained_size: tuple[int, int] | None = None,
        hidden: int = 512,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pretrain_size = pretrain_size
        self.trained_size = trained_size
        self.fc1 = nn.Linear(2, hidden, **dd)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, num_heads, **dd)
        self._kept: tuple[tuple, list[Tensor], Tensor] | None = None

    def __getstate__(self) -> dict:
        # What is kept may be a tensor that cannot be copied.
        return {**self.__dict__, "_kept": None}

    def forward(self, size: tuple[int, int], pooled: tuple[int, int], sr_ratio: int) -> Tensor:
        """Return the bias of every pair of distances of `bias_axes`, ``[heads, Sy, Sx]``.

        Without gradients, and on a CPU, that of the last size is kept for as long as the weights are the same.
        """
        if torch.jit.is_scripting():
            pairs = distance_pairs(size, pooled, sr_ratio, self.trained_size, self.pretrain_size, self.fc1.weight)
            return self._bias(pairs)
        else:
            return self._keep(size, pooled, sr_ratio)

    def _keep(self, size: tuple[int, int], pooled: tuple[int, int], sr_ratio: int) -> Tensor:
        pairs = partial(distance_pairs, size, pooled, sr_ratio, self.trained_size, self.pretrain_size)
        if not self._may_keep():
            # Layers quantized dynamically have no parameters; they take float32.
            return self._bias(pairs(next(self.parameters(), torch.empty(0))))
        shape = (tuple(size), tuple(pooled), sr_ratio, self.trained_size, self.pretrain_size)
        weights = [parameter.detach() for parameter in self.parameters()]
        if self._kept is not None:
            kept_shape, kept_weights, bias = self._kept
            # Weights are compared by their numbers: some averages of weights overwrite them without a trace.
            if kept_shape == shape and all(map(_same, kept_weights, weights)):
                return bias
        rows = pairs(weights[0])
        parts = rows.split(max(1, _HIDDEN // (self.fc1.out_features * rows.shape[1])))
        bias = torch.cat([self._bias(part) for part in parts], 1)
        self._kept = (shape, [weight.clone() for weight in weights], bias)
        return bias

    def _may_keep(self) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or exporting() or self.training:
            return False
        plain = is_plain(self.fc1, self.fc2) and type(self.act) is nn.ReLU and not torch.is_autocast_enabled("cpu")
        return plain and self.fc1.weight.device.type == "cpu" and transform_obstacle() is None

    def _bias(self, pairs: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(pairs))).permute(2, 0, 1)


def bias_axes(
    size: tuple[int, int], pooled: tuple[int, int], sr_ratio: int, trained_size: tuple[int, int] | None
) -> tuple[AxisTable, AxisTable]:
    """Return the tables of both axes of a map and a pooled one; ``sr_ratio`` pools the trained size."""
    tables = []
    for i in range(2):
        queries, keys = int(size[i]), int(pooled[i])
        trained = (queries, keys)
        if trained_size is not None:
            trained = (trained_size[i], max(1, trained_size[i] // sr_ratio))
        tables.append(axis_table(queries, keys, *trained))
    return tables[0], tables[1]


@torch.jit.ignore
def distance_pairs(
    size: tuple[int, int],
    pooled: tuple[int, int],
    sr_ratio: int,
    trained_size: tuple[int, int] | None,
    pretrain_size: tuple[int, int],
    like: Tensor,
) -> Tensor:
    """Return what the MLP sees of the distances of `bias_axes`, ``[Sy, Sx, 2]``, with dtype and device of ``like``."""
    exact = torch.promote_types(like.dtype, torch.float32)
    axes = bias_axes(size, pooled, sr_ratio, trained_size)
    y, x = (
        coordinates(axis.distances.to(like.device, exact), length)
        for axis, length in zip(axes, pretrain_size, strict=True)
    )
    return torch.stack([y[:, None].expand(-1, x.shape[0]), x[None].expand(y.shape[0], -1)], -1).to(like.dtype)


def coordinates(distances: Tensor, pretrain: int) -> Tensor:
    """Return what the MLP sees of distances on an axis, about -1 to 1 on a map of the trained length."""
    scaled = distances / max(pretrain - 1, 1) * 8
    return scaled.sign() * torch.log2(scaled.abs() + 1) / 3


def bias_of_rows(table: Tensor, rows: AxisTable, columns: AxisTable, first: int, end: int) -> Tensor:
    """Return the bias ``[heads, (end - first) * W, keys]`` of some rows' queries, from `ContinuousBias`'s output."""
    index, weight = (part[first:end].to(table.device) for part in rows[1:])
    height, key_rows, terms = index.shape
    lines = table.index_select(1, index.flatten()).unflatten(1, (height, key_rows, terms))
    lines = lines[:, :, :, 0] if terms == 1 else torch.einsum("hqkts,qkt->hqks", lines, weight.to(table.dtype))
    lines = lines.flatten(1)  # [heads, rows * key rows * Sx]
    index, weight = (part.to(table.device) for part in columns[1:])
    start = torch.arange(height * key_rows, device=table.device).view(height, 1, key_rows, 1) * table.shape[2]
    bias = None
    for term in range(index.shape[2]):
        at = start + index[None, :, None, :, term]
        part = lines.index_select(1, at.flatten()).unflatten(1, at.shape)
        if index.shape[2] > 1:
            part = part * weight[None, :, None, :, term].to(table.dtype)
        bias = part if bias is None else bias + part
    return bias.flatten(3).flatten(1, 2)
