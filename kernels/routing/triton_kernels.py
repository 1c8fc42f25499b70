"""Routed attention in triton: keys and values are read where they lie, through the routes, never gathered.

A program takes a block of queries of one region and head and walks over the keys of its chosen regions as one list,
so that small regions fill the blocks too. The gradient of keys and values is the same walk with the roles exchanged:
the inverse of the routes lists the query regions that chose a key region, so every sum has one writer and no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634


@triton.jit
def _offsets(region, token, columns, region_height, region_width, stride_y, stride_x):
    """Return where the tokens of regions lie in a map."""
    y = (region // columns) * region_height + token // region_width
    x = (region % columns) * region_width + token % region_width
    return y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    routes,
    out,
    lse,
    q_batch,
    q_y,
    q_x,
    q_head,
    k_batch,
    k_y,
    k_x,
    k_head,
    v_batch,
    v_y,
    v_x,
    v_head,
    o_batch,
    o_y,
    o_x,
    o_head,
    heads,
    regions,
    columns,
    region_height,
    region_width,
    topk,
    scale_log2,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write output and log2-sum-exp of a block of queries."""
    tokens = region_height * region_width
    blocks = tl.cdiv(tokens, BLOCK_M)
    region = tl.program_id(0) // blocks
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DIM)
    here = (m < tokens)[:, None] & (d < DIM)[None, :]
    at = _offsets(region, m, columns, region_height, region_width, q_y, q_x)
    q = tl.load(query + image * q_batch + head * q_head + at[:, None] + d[None, :], mask=here, other=0.0)

    chosen = routes + (image * regions + region) * topk
    keys = key + image * k_batch + head * k_head
    values = value + image * v_batch + head * v_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for start in range(0, topk * tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < topk * tokens
        source = tl.load(chosen + n // tokens, mask=inside, other=0)
        there = inside[:, None] & (d < DIM)[None, :]
        to = _offsets(source, n % tokens, columns, region_height, region_width, k_y, k_x)
        k = tl.load(keys + to[:, None] + d[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        to = _offsets(source, n % tokens, columns, region_height, region_width, v_y, v_x)
        v = tl.load(values + to[:, None] + d[None, :], mask=there, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    at = _offsets(region, m, columns, region_height, region_width, o_y, o_x)
    target = out + image * o_batch + head * o_head + at[:, None] + d[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)
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
    g_batch,
    g_y,
    g_x,
    g_head,
    q_batch,
    q_y,
    q_x,
    q_head,
    k_batch,
    k_y,
    k_x,
    k_head,
    v_batch,
    v_y,
    v_x,
    v_head,
    o_batch,
    o_y,
    o_x,
    o_head,
    heads,
    regions,
    columns,
    region_height,
    region_width,
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
    tokens = region_height * region_width
    blocks = tl.cdiv(tokens, BLOCK_M)
    region = tl.program_id(0) // blocks
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DIM)
    here = (m < tokens)[:, None] & (d < DIM)[None, :]
    at = _offsets(region, m, columns, region_height, region_width, q_y, q_x)
    q = tl.load(query + image * q_batch + head * q_head + at[:, None] + d[None, :], mask=here, other=0.0)
    at = _offsets(region, m, columns, region_height, region_width, g_y, g_x)
    g = tl.load(grad + image * g_batch + head * g_head + at[:, None] + d[None, :], mask=here, other=0.0)
    # Output and query gradient are laid out alike, without gaps.
    at = _offsets(region, m, columns, region_height, region_width, o_y, o_x)
    at = image * o_batch + head * o_head + at[:, None] + d[None, :]
    o = tl.load(out + at, mask=here, other=0.0)
    row = ((image * heads + head) * regions + region) * tokens + m
    log_sum = tl.load(lse + row, mask=m < tokens, other=0.0)
    mean = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + row, mean, mask=m < tokens)

    chosen = routes + (image * regions + region) * topk
    keys = key + image * k_batch + head * k_head
    values = value + image * v_batch + head * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for start in range(0, topk * tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < topk * tokens
        source = tl.load(chosen + n // tokens, mask=inside, other=0)
        there = inside[:, None] & (d < DIM)[None, :]
        offsets = _offsets(source, n % tokens, columns, region_height, region_width, k_y, k_x)
        k = tl.load(keys + offsets[:, None] + d[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        weights = tl.where(inside[None, :], tl.exp2(scores - log_sum[:, None]), 0.0)
        offsets = _offsets(source, n % tokens, columns, region_height, region_width, v_y, v_x)
        v = tl.load(values + offsets[:, None] + d[None, :], mask=there, other=0.0)
        grad_scores = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - mean[:, None])
        acc += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    tl.store(grad_query + at, (acc * scale).to(grad_query.dtype.element_ty), mask=here)


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
    g_batch,
    g_y,
    g_x,
    g_head,
    q_batch,
    q_y,
    q_x,
    q_head,
    k_batch,
    k_y,
    k_x,
    k_head,
    v_batch,
    v_y,
    v_x,
    v_head,
    o_batch,
    o_y,
    o_x,
    o_head,
    heads,
    regions,
    columns,
    region_height,
    region_width,
    scale,
    scale_log2,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of a block of keys and values: a walk over the queries that chose their region."""
    tokens = region_height * region_width
    blocks = tl.cdiv(tokens, BLOCK_N)
    region = tl.program_id(0) // blocks
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_DIM)
    here = (n < tokens)[:, None] & (d < DIM)[None, :]
    at = _offsets(region, n, columns, region_height, region_width, k_y, k_x)
    k = tl.load(key + image * k_batch + head * k_head + at[:, None] + d[None, :], mask=here, other=0.0)
    at = _offsets(region, n, columns, region_height, region_width, v_y, v_x)
    v = tl.load(value + image * v_batch + head * v_head + at[:, None] + d[None, :], mask=here, other=0.0)

    first = tl.load(starts + image * regions + region)
    count = (tl.load(starts + image * regions + region + 1) - first) * tokens
    queries = query + image * q_batch + head * q_head
    grads = grad + image * g_batch + head * g_head
    rows = (image * heads + head) * regions * tokens
    acc_k = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    for start in range(0, count, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < count
        chooser = tl.load(choosers + first + m // tokens, mask=inside, other=0)
        there = inside[:, None] & (d < DIM)[None, :]
        to = _offsets(chooser, m % tokens, columns, region_height, region_width, q_y, q_x)
        q = tl.load(queries + to[:, None] + d[None, :], mask=there, other=0.0)
        to = _offsets(chooser, m % tokens, columns, region_height, region_width, g_y, g_x)
        g = tl.load(grads + to[:, None] + d[None, :], mask=there, other=0.0)
        row = rows + chooser.to(tl.int64) * tokens + m % tokens
        log_sum = tl.load(lse + row, mask=inside, other=0.0)
        mean = tl.load(delta + row, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
        weights = tl.where(inside[None, :], tl.exp2(scores - log_sum[None, :]), 0.0)
        acc_v += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        grad_scores = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - mean[None, :])
        acc_k += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)

    # The gradients are laid out alike, without gaps.
    at = _offsets(region, n, columns, region_height, region_width, o_y, o_x)
    at = image * o_batch + head * o_head + at[:, None] + d[None, :]
    tl.store(grad_key + at, (acc_k * scale).to(grad_key.dtype.element_ty), mask=here)
    tl.store(grad_value + at, acc_v.to(grad_value.dtype.element_ty), mask=here)


def launch_options(tokens: int, keys: int, dim: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Return the constants of a launch and its warps.

    Args:
        tokens: Tokens of a region.
        keys: Keys of a query; for the gradient of keys and values, queries of a key.
        dim: Channels of a head.
        dtype: Of queries, keys and values.
    """
    block_dim = max(16, triton.next_power_of_2(dim))
    exact = dtype == torch.float32
    # Wide heads and float32 take smaller blocks, and float32 more warps, so that nothing spills.
    longest = (64 if block_dim <= 64 else 32) // (2 if exact else 1)
    return {
        "DIM": dim,
        "BLOCK_DIM": block_dim,
        "BLOCK_M": min(longest, max(16, triton.next_power_of_2(tokens))),
        "BLOCK_N": min(longest, max(16, triton.next_power_of_2(keys))),
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 8 if exact and block_dim > 32 else 4,
        "enable_fp_fusion": True,  # Triton 3.10 no longer does so by default
    }


def _rows_of_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def triton_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, region_size: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, W, heads, dim]`` and ``lse`` ``[B, heads, H * W]``, region after region."""
    batch, height, width, heads, dim = query.shape
    regions, topk = routes.shape[1:]
    tokens = region_size[0] * region_size[1]
    query, key, value = map(_rows_of_channels, (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, heads, height * width, dtype=torch.float32)
    if not out.numel():
        return out, lse
    options = launch_options(tokens, topk * tokens, dim, query.dtype)
    forward_kernel[(regions * triton.cdiv(tokens, options["BLOCK_M"]), batch * heads)](
        query,
        key,
        value,
        routes.contiguous(),
        out,
        lse,
        *query.stride()[:4],
        *key.stride()[:4],
        *value.stride()[:4],
        *out.stride()[:4],
        heads,
        regions,
        width // region_size[1],
        *region_size,
        topk,
        scale * _LOG2E,
        **options,
    )
    return out, lse


def inverse_routes(routes: Tensor) -> tuple[Tensor, Tensor]:
    """Return who chose each region: ``choosers`` ``[B * regions * topk]`` and ``starts`` ``[B * regions + 1]``.

    Region ``r`` of image ``b`` was chosen by ``choosers[starts[i]:starts[i + 1]]`` with ``i = b * regions + r``.
    """
    batch, regions, topk = routes.shape
    chosen = (routes + torch.arange(batch, device=routes.device)[:, None, None] * regions).flatten()
    chosen, order = chosen.sort(stable=True)
    starts = torch.searchsorted(chosen, torch.arange(batch * regions + 1, device=routes.device))
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
    grad, query, key, value = map(_rows_of_channels, (grad, query, key, value))
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    if not query.numel():
        return tuple(grads)
    delta = torch.empty_like(lse)
    strides = [stride for x in (grad, query, key, value, out) for stride in x.stride()[:4]]
    grid = (heads, regions, width // region_size[1], *region_size)
    options = launch_options(tokens, topk * tokens, dim, query.dtype)
    backward_query_kernel[(regions * triton.cdiv(tokens, options["BLOCK_M"]), batch * heads)](
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
        *grid,
        topk,
        scale,
        scale * _LOG2E,
        **options,
    )
    # As many queries choose a region as it has keys, on average.
    options = launch_options(topk * tokens, tokens, dim, query.dtype)
    backward_key_value_kernel[(regions * triton.cdiv(tokens, options["BLOCK_N"]), batch * heads)](
        grad,
        query,
        key,
        value,
        *inverse_routes(routes),
        lse,
        delta,
        *grads[1:],
        *strides,
        *grid,
        scale,
        scale * _LOG2E,
        **options,
    )
    return tuple(grads)
