"""The Triton kernels of the operator; imported only when one is launched.

A program serves one parent: its four queries share the candidates, so that every chosen key or value is read once, in
place, from the map. Programs lie on one grid axis and offsets are 64-bit: no limit on heads, batch or map size.
An index outside the map is skipped; checking it would make the host wait for the device.
"""

import triton
import triton.language as tl

from ..triton_launch import TileSize, power_of_two, size_for

# A program owns four siblings and walks over candidates; with the vectors in float32, the products of a tile must stay
# in the registers of four warps.
SIZES = [
    TileSize(64, 4, 128, 4, 3),
    TileSize(128, 4, 64, 4, 3),
    TileSize(256, 4, 32, 4, 3),
    TileSize(512, 4, 16, 4, 3),
    TileSize(1024, 4, 8, 4, 3),
]


@triton.jit
def _candidates(token_index_ptr, parent, start, K: tl.constexpr, tokens, BLOCK: tl.constexpr):
    """Return the flat child tokens of a block of candidates, and which of them exist."""
    slot = start + tl.arange(0, BLOCK)
    token = tl.load(token_index_ptr + parent * K + slot // 4, mask=slot < 4 * K, other=-1).to(tl.int64)
    return slot, token * 4 + slot % 4, (token >= 0) & (token < tokens)


@triton.jit
def _rows(pointer, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(pointer + row[:, None] * D + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def _rows_that_exist(pointer, row, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = exists[:, None] & (column < D)
    return tl.load(pointer + row[:, None] * D + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weights(pointer, parent, slot, K: tl.constexpr):
    """Return the weights of a parent's four queries for a block of candidates."""
    row = (parent * 4 + tl.arange(0, 4))[:, None] * (4 * K)
    return tl.load(pointer + row + slot[None, :], mask=slot[None, :] < 4 * K, other=0.0).to(tl.float32)


@triton.jit
def scores_kernel(
    query_ptr,
    key_ptr,
    token_index_ptr,
    out_ptr,
    parents,
    tokens,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products of a parent's four queries with the children of its ``K`` chosen tokens."""
    parent = tl.program_id(0).to(tl.int64)
    key_ptr += parent // parents * tokens * 4 * D
    sibling = tl.arange(0, 4)
    query = _rows(query_ptr, parent * 4 + tl.arange(0, 4), D, BLOCK_D)
    for start in range(0, 4 * K, BLOCK):
        slot, token, exists = _candidates(token_index_ptr, parent, start, K, tokens, BLOCK)
        key = _rows_that_exist(key_ptr, token, exists, D, BLOCK_D)
        product = tl.sum(query[:, None, :] * key[None, :, :], axis=2)
        tl.store(
            out_ptr + (parent * 4 + sibling[:, None]) * (4 * K) + slot[None, :], product, mask=slot[None, :] < 4 * K
        )


@triton.jit
def values_kernel(
    weights_ptr,
    value_ptr,
    token_index_ptr,
    out_ptr,
    parents,
    tokens,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weighted sums, one for each of a parent's four queries, of the children of its ``K`` chosen tokens."""
    parent = tl.program_id(0).to(tl.int64)
    value_ptr += parent // parents * tokens * 4 * D
    sibling, column = tl.arange(0, 4), tl.arange(0, BLOCK_D)
    total = tl.zeros((4, BLOCK_D), dtype=tl.float32)
    for start in range(0, 4 * K, BLOCK):
        slot, token, exists = _candidates(token_index_ptr, parent, start, K, tokens, BLOCK)
        value = _rows_that_exist(value_ptr, token, exists, D, BLOCK_D)
        weights = _weights(weights_ptr, parent, slot, K)
        total += tl.sum(weights[:, :, None] * value[None, :, :], axis=1)
    tl.store(
        out_ptr + (parent * 4 + sibling[:, None]) * D + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=column[None, :] < D,
    )


@triton.jit
def scatter_kernel(
    weights_ptr,
    query_ptr,
    token_index_ptr,
    out_ptr,
    parents,
    tokens,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The transpose of `values_kernel`: add a parent's weighted queries to its candidates, atomically, in float32."""
    parent = tl.program_id(0).to(tl.int64)
    out_ptr += parent // parents * tokens * 4 * D
    column = tl.arange(0, BLOCK_D)
    query = _rows(query_ptr, parent * 4 + tl.arange(0, 4), D, BLOCK_D)
    for start in range(0, 4 * K, BLOCK):
        slot, token, exists = _candidates(token_index_ptr, parent, start, K, tokens, BLOCK)
        weights = _weights(weights_ptr, parent, slot, K)
        share = tl.sum(weights[:, :, None] * query[:, None, :], axis=0)
        tl.atomic_add(
            out_ptr + token[:, None] * D + column[None, :],
            share,
            mask=exists[:, None] & (column[None, :] < D),
            sem="relaxed",
        )


def launch_options(dim: int, count: int) -> dict[str, int]:
    """Return the constants of a launch for ``count`` tokens a parent, its warps and stages."""
    block_d = power_of_two(dim)
    size = size_for(SIZES, 4 * block_d)
    return {
        "K": count,
        "D": dim,
        "BLOCK": min(size.walked, power_of_two(4 * count, least=4)),
        "BLOCK_D": block_d,
        "num_warps": size.warps,
        "num_stages": size.stages,
    }
