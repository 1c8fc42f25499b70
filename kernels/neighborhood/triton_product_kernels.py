"""The Triton kernels of the unfused products; imported only when one is launched.

Windows come as tables of tokens, so that the kernels know nothing of kernel sizes, dilation or causality. Programs lie
on one grid axis and offsets are 64-bit: no limit on heads, batch or map size. Nothing is added to by two programs, so
results are deterministic.
"""

import triton
import triton.language as tl

from ..triton_launch import power_of_two

# Products of vectors that a program holds at once, in float32: 32 registers a thread of four warps.
_HELD = 4096


@triton.jit
def _own(heads, tokens, BLOCK: tl.constexpr):
    """Return a program's image, head and tokens."""
    blocks = tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    plane = program // blocks
    token = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return plane // heads, plane % heads, token


@triton.jit
def scores_kernel(
    query,
    key,
    out,
    table,
    tokens,
    heads,
    query_b,
    query_n,
    query_h,
    key_b,
    key_n,
    key_h,
    out_b,
    out_n,
    out_h,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Products of each query with the keys of its window; 0 where a slot has no key."""
    image, head, token = _own(heads, tokens, BLOCK)
    column = tl.arange(0, BLOCK_DIM)
    here = token < tokens
    own_rows = query + image * query_b + head * query_h + token[:, None] * query_n + column[None, :]
    own = tl.load(own_rows, mask=here[:, None] & (column < DIM)[None, :], other=0.0).to(tl.float32)
    for start in range(0, SLOTS, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        within = here[:, None] & (slot < SLOTS)[None, :]
        seen = tl.load(table + token[:, None] * SLOTS + slot[None, :], mask=within, other=-1).to(tl.int64)
        rows = key + image * key_b + head * key_h + seen[:, :, None] * key_n + column[None, None, :]
        mask = (seen >= 0)[:, :, None] & (column < DIM)[None, None, :]
        other = tl.load(rows, mask=mask, other=0.0).to(tl.float32)
        product = tl.sum(own[:, None, :] * other, axis=2)
        to = out + image * out_b + head * out_h + token[:, None] * out_n + slot[None, :]
        tl.store(to, product.to(out.dtype.element_ty), mask=within)


@triton.jit
def values_kernel(
    weights,
    value,
    out,
    table,
    tokens,
    heads,
    weights_b,
    weights_n,
    weights_h,
    value_b,
    value_n,
    value_h,
    out_b,
    out_n,
    out_h,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Sums of the values of each window by weights; those of slots without a key are not read."""
    image, head, token = _own(heads, tokens, BLOCK)
    column = tl.arange(0, BLOCK_DIM)
    here = token < tokens
    total = tl.zeros((BLOCK, BLOCK_DIM), dtype=tl.float32)
    for start in range(0, SLOTS, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        within = here[:, None] & (slot < SLOTS)[None, :]
        seen = tl.load(table + token[:, None] * SLOTS + slot[None, :], mask=within, other=-1).to(tl.int64)
        at = weights + image * weights_b + head * weights_h + token[:, None] * weights_n + slot[None, :]
        weight = tl.load(at, mask=seen >= 0, other=0.0).to(tl.float32)
        rows = value + image * value_b + head * value_h + seen[:, :, None] * value_n + column[None, None, :]
        mask = (seen >= 0)[:, :, None] & (column < DIM)[None, None, :]
        total += tl.sum(weight[:, :, None] * tl.load(rows, mask=mask, other=0.0).to(tl.float32), axis=1)
    to = out + image * out_b + head * out_h + token[:, None] * out_n + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=here[:, None] & (column < DIM)[None, :])


@triton.jit
def scatter_kernel(
    weights,
    x,
    out,
    pairs,
    ends,
    tokens,
    heads,
    weights_b,
    weights_n,
    weights_h,
    x_b,
    x_n,
    x_h,
    out_b,
    out_n,
    out_h,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """What each key gets of the queries that see it: ``pairs`` are ``query * SLOTS + slot``, sorted by key."""
    program = tl.program_id(0).to(tl.int64)
    plane, token = program // tokens, program % tokens
    image, head = plane // heads, plane % heads
    column = tl.arange(0, BLOCK_DIM)
    first, end = tl.load(ends + token), tl.load(ends + token + 1)
    total = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    for start in range(first, end, BLOCK_PAIRS):
        at = start + tl.arange(0, BLOCK_PAIRS)
        pair = tl.load(pairs + at, mask=at < end, other=0)
        query, slot = pair // SLOTS, pair % SLOTS
        weight = tl.load(
            weights + image * weights_b + head * weights_h + query * weights_n + slot, mask=at < end, other=0.0
        ).to(tl.float32)
        rows = x + image * x_b + head * x_h + query[:, None] * x_n + column[None, :]
        mask = (at < end)[:, None] & (column < DIM)[None, :]
        total += tl.sum(weight[:, None] * tl.load(rows, mask=mask, other=0.0).to(tl.float32), axis=0)
    to = out + image * out_b + head * out_h + token * out_n + column
    tl.store(to, total.to(out.dtype.element_ty), mask=column < DIM)


def launch_options(kernel: str, dim: int, slots: int) -> dict[str, int]:
    """Return the constants of a launch for vectors of ``dim``, its warps and stages."""
    block_dim = power_of_two(dim)
    options = {"SLOTS": slots, "DIM": dim}
    if kernel == "scatter_kernel":
        options["BLOCK_PAIRS"] = max(1, min(64, _HELD // block_dim))
    else:
        options["BLOCK_SLOTS"] = min(8, power_of_two(slots, least=1), max(1, _HELD // block_dim))
        options = {
            "SLOTS": slots,
            "DIM": dim,
            "BLOCK": max(1, min(16, _HELD // block_dim // options["BLOCK_SLOTS"])),
            "BLOCK_SLOTS": options["BLOCK_SLOTS"],
        }
    return options | {"BLOCK_DIM": block_dim, "num_warps": 4, "num_stages": 1}
