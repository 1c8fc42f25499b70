"""Routed attention in triton: keys and values are read where they lie, through the routes, never gathered.

A program takes a block of queries of one region and head and walks over the keys of its chosen regions as one list,
so that small regions fill the blocks too. The gradient of keys and values is the same walk with the roles exchanged:
the inverse of the routes lists the query regions that chose a key region, so every sum has one writer and no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import contiguous_rows
from ..triton_launch import LOG2E, TileSize, launch, power_of_two, size_for

# Wide heads and float32 take smaller blocks, and float32 more warps, so that nothing spills. A program owns queries (of
# the gradient of keys and values: keys) and walks over keys (queries).
SIZES = {
    "half": [TileSize(128, 64, 64, 4, 3), TileSize(256, 32, 32, 4, 3)],
    "float32": [TileSize(128, 32, 32, 4, 3), TileSize(256, 32, 32, 8, 3), TileSize(512, 16, 16, 8, 3)],
}


@triton.jit
def _block(tokens, heads, BLOCK: tl.constexpr):
    """Return what a program works on: image, head, region, and the numbers of a block of the region's tokens."""
    blocks = tl.cdiv(tokens, BLOCK)
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    return image, head, tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _rows(pointer, image, head, strides):
    """Return the pointer to a head of a map; ``strides`` are those of batch, row, column and head."""
    return pointer + image * strides[0] + head * strides[3]


@triton.jit
def _offsets(region, token, grid, strides, BLOCK_DIM: tl.constexpr):
    """Return where the tokens of regions lie in a map, whose ``grid`` is columns, and height and width of a region."""
    y = region // grid[0] * grid[1] + token // grid[2]
    x = region % grid[0] * grid[2] + token % grid[2]
    at = y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]
    return at[:, None] + tl.arange(0, BLOCK_DIM)[None, :]


@triton.jit
def _mask(inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    return inside[:, None] & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    routes,
    out,
    lse,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    grid,
    heads,
    regions,
    topk,
    scale_log2,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write output and log2-sum-exp of a block of queries."""
    tokens = grid[1] * grid[2]
    image, head, region, m = _block(tokens, heads, BLOCK_M)
    here = _mask(m < tokens, DIM, BLOCK_DIM)
    at = _offsets(region, m, grid, query_strides, BLOCK_DIM)
    q = tl.load(_rows(query, image, head, query_strides) + at, mask=here, other=0.0)

    region_routes = routes + (image * regions + region) * topk
    keys = _rows(key, image, head, key_strides)
    values = _rows(value, image, head, value_strides)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for start in range(0, topk * tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < topk * tokens
        source = tl.load(region_routes + n // tokens, mask=inside, other=0)
        there = _mask(inside, DIM, BLOCK_DIM)
        k = tl.load(keys + _offsets(source, n % tokens, grid, key_strides, BLOCK_DIM), mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + _offsets(source, n % tokens, grid, value_strides, BLOCK_DIM), mask=there, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    at = _offsets(region, m, grid, out_strides, BLOCK_DIM)
    tl.store(_rows(out, image, head, out_strides) + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)
    row = ((image * heads + head) * regions + region) * tokens + m
    tl.store(lse + row, top + tl.log2(total), mask=m < tokens)


@triton.jit
def backward_query_kernel(
    grad,
    query,
    key,
    value,
    routes,
    out,
    lse,
    delta,
    grad_query,
    grad_strides,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    grid,
    heads,
    regions,
    topk,
    scale,
    scale_log2,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of a block of queries, and their ``delta``, the sum of output times gradient."""
    tokens = grid[1] * grid[2]
    image, head, region, m = _block(tokens, heads, BLOCK_M)
    here = _mask(m < tokens, DIM, BLOCK_DIM)
    at = _offsets(region, m, grid, query_strides, BLOCK_DIM)
    q = tl.load(_rows(query, image, head, query_strides) + at, mask=here, other=0.0)
    at = _offsets(region, m, grid, grad_strides, BLOCK_DIM)
    g = tl.load(_rows(grad, image, head, grad_strides) + at, mask=here, other=0.0)
    # Output and query gradient are laid out alike, without gaps.
    at = _offsets(region, m, grid, out_strides, BLOCK_DIM)
    o = tl.load(_rows(out, image, head, out_strides) + at, mask=here, other=0.0)
    row = ((image * heads + head) * regions + region) * tokens + m
    log_sum = tl.load(lse + row, mask=m < tokens, other=0.0)
    mean = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + row, mean, mask=m < tokens)

    region_routes = routes + (image * regions + region) * topk
    keys = _rows(key, image, head, key_strides)
    values = _rows(value, image, head, value_strides)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for start in range(0, topk * tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < topk * tokens
        source = tl.load(region_routes + n // tokens, mask=inside, other=0)
        there = _mask(inside, DIM, BLOCK_DIM)
        k = tl.load(keys + _offsets(source, n % tokens, grid, key_strides, BLOCK_DIM), mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        weights = tl.where(inside[None, :], tl.exp2(scores - log_sum[:, None]), 0.0)
        v = tl.load(values + _offsets(source, n % tokens, grid, value_strides, BLOCK_DIM), mask=there, other=0.0)
        grad_scores = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - mean[:, None])
        acc += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    tl.store(_rows(grad_query, image, head, out_strides) + at, (acc * scale).to(grad_query.dtype.element_ty), mask=here)


@triton.jit
def backward_key_value_kernel(
    grad,
    query,
    key,
    value,
    choosers,
    starts,
    lse,
    delta,
    grad_key,
    grad_value,
    grad_strides,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    grid,
    heads,
    regions,
    scale,
    scale_log2,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of a block of keys and values: a walk over the queries that chose their region."""
    tokens = grid[1] * grid[2]
    image, head, region, n = _block(tokens, heads, BLOCK_N)
    here = _mask(n < tokens, DIM, BLOCK_DIM)
    at = _offsets(region, n, grid, key_strides, BLOCK_DIM)
    k = tl.load(_rows(key, image, head, key_strides) + at, mask=here, other=0.0)
    at = _offsets(region, n, grid, value_strides, BLOCK_DIM)
    v = tl.load(_rows(value, image, head, value_strides) + at, mask=here, other=0.0)

    first = tl.load(starts + image * regions + region)
    count = (tl.load(starts + image * regions + region + 1) - first) * tokens
    queries = _rows(query, image, head, query_strides)
    grads = _rows(grad, image, head, grad_strides)
    rows = (image * heads + head) * regions * tokens
    acc_k = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    for start in range(0, count, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < count
        chooser = tl.load(choosers + first + m // tokens, mask=inside, other=0)
        there = _mask(inside, DIM, BLOCK_DIM)
        q = tl.load(queries + _offsets(chooser, m % tokens, grid, query_strides, BLOCK_DIM), mask=there, other=0.0)
        g = tl.load(grads + _offsets(chooser, m % tokens, grid, grad_strides, BLOCK_DIM), mask=there, other=0.0)
        row = rows + chooser.to(tl.int64) * tokens + m % tokens
        log_sum = tl.load(lse + row, mask=inside, other=0.0)
        mean = tl.load(delta + row, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
        weights = tl.where(inside[None, :], tl.exp2(scores - log_sum[None, :]), 0.0)
        acc_v += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        grad_scores = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - mean[None, :])
        acc_k += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)

    # The gradients are laid out alike, without gaps.
    at = _offsets(region, n, grid, out_strides, BLOCK_DIM)
    tl.store(_rows(grad_key, image, head, out_strides) + at, (acc_k * scale).to(grad_key.dtype.element_ty), mask=here)
    tl.store(_rows(grad_value, image, head, out_strides) + at, acc_v.to(grad_value.dtype.element_ty), mask=here)


def launch_options(tokens: int, keys: int, dim: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Return the constants of a launch, its warps and stages.

    Args:
        tokens: Tokens of a region.
        keys: Keys of a query; for the gradient of keys and values, queries of a key.
        dim: Channels of a head.
        dtype: Of queries, keys and values.
    """
    block_dim = power_of_two(dim)
    exact = dtype == torch.float32
    size = size_for(SIZES["float32" if exact else "half"], block_dim * dtype.itemsize)
    return {
        "DIM": dim,
        "BLOCK_DIM": block_dim,
        "BLOCK_M": min(size.own, power_of_two(tokens)),
        "BLOCK_N": min(size.walked, power_of_two(keys)),
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": size.warps,
        "num_stages": size.stages,
    }


def triton_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, region_size: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, W, heads, dim]`` and ``lse`` ``[B, heads, H * W]``, region after region."""
    batch, height, width, heads, dim = query.shape
    regions, topk = routes.shape[1:]
    tokens = region_size[0] * region_size[1]
    query, key, value = map(contiguous_rows, (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, heads, height * width, dtype=torch.float32)
    if not out.numel():
        return out, lse
    options = launch_options(tokens, topk * tokens, dim, query.dtype)
    launch(
        forward_kernel,
        (regions * triton.cdiv(tokens, options["BLOCK_M"]), batch * heads),
        query.device,
        query,
        key,
        value,
        routes.contiguous(),
        out,
        lse,
        *(x.stride()[:4] for x in (query, key, value, out)),
        (width // region_size[1], *region_size),
        heads,
        regions,
        topk,
        scale * LOG2E,
        **options,
    )
    return out, lse


def inverse_routes(routes: Tensor) -> tuple[Tensor, Tensor]:
    """Return who chose each region: ``choosers`` ``[B * regions * topk]`` and ``starts`` ``[B * regions + 1]``.

    Region ``r`` of image ``b`` was chosen by ``choosers[starts[i]:starts[i + 1]]`` with ``i = b * regions + r``.
    """
    batch, regions, topk = routes.shape
    flat_routes = (routes + torch.arange(batch, device=routes.device)[:, None, None] * regions).flatten()
    flat_routes, order = flat_routes.sort(stable=True)
    starts = torch.searchsorted(flat_routes, torch.arange(batch * regions + 1, device=routes.device))
    return order // topk % regions, starts


def triton_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    region_size: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value for the gradient ``grad`` of the output."""
    batch, _, width, heads, dim = query.shape
    regions, topk = routes.shape[1:]
    tokens = region_size[0] * region_size[1]
    grad, query, key, value = map(contiguous_rows, (grad, query, key, value))
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    if not query.numel():
        return tuple(grads)
    delta = torch.empty_like(lse)
    strides = [x.stride()[:4] for x in (grad, query, key, value, out)]
    grid = (width // region_size[1], *region_size)
    options = launch_options(tokens, topk * tokens, dim, query.dtype)
    launch(
        backward_query_kernel,
        (regions * triton.cdiv(tokens, options["BLOCK_M"]), batch * heads),
        query.device,
        grad,
        query,
        key,
        value,
        routes.contiguous(),
        out,
        lse,
        delta,
        grads[0],
        *strides,
        grid,
        heads,
        regions,
        topk,
        scale,
        scale * LOG2E,
        **options,
    )
    # As many queries choose a region as it has keys, on average.
    options = launch_options(topk * tokens, tokens, dim, query.dtype)
    launch(
        backward_key_value_kernel,
        (regions * triton.cdiv(tokens, options["BLOCK_N"]), batch * heads),
        query.device,
        grad,
        query,
        key,
        value,
        *inverse_routes(routes),
        lse,
        delta,
        *grads[1:],
        *strides,
        grid,
        heads,
        regions,
        scale,
        scale * LOG2E,
        **options,
    )
    return tuple(grads)
