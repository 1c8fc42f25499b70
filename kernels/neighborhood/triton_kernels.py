"""Neighborhood attention in triton, forward and backward; imported only when it runs.

A program takes a tile of queries of one head and dilation group and walks, box after box, over the block of keys that
holds their windows. Windows are products of axes, so the pairs to hide follow from one comparison per axis, and nothing
is stored per pair. Positions are counted within the dilation group; only addresses know the dilation. Maps of one and
two axes are volumes with axes of length one, whose comparisons vanish at compile time. What has a value for each axis
is a tuple.

The gradient of keys and values is the same walk from the key's side: windows advance with the query, so the queries
that see a tile of keys are a block too. Every sum has one writer: no atomics, and the same bits in every run.
"""

import triton
import triton.language as tl

from ..triton_launch import LOG2E

_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(1 / LOG2E)


@triton.jit
def _count(length, dilation, TILE: tl.constexpr):
    """Return the number of tiles of an axis, over all its dilation groups."""
    return tl.cdiv(tl.cdiv(length, dilation), TILE) * dilation


@triton.jit
def _place(index, length, dilation, TILE: tl.constexpr):
    """Return the dilation group of a tile, its first position in the group, and the group's length."""
    group = index % dilation
    return group, index // dilation * TILE, (length - group + dilation - 1) // dilation


@triton.jit
def _tile(length, dilation, heads, TILE: tl.constexpr):
    """Return what a program works on: image, head, dilation groups, first positions in them, and their lengths."""
    index = tl.program_id(0)
    count2 = _count(length[2], dilation[2], TILE[2])
    count1 = _count(length[1], dilation[1], TILE[1])
    count0 = _count(length[0], dilation[0], TILE[0])
    group2, start2, n2 = _place(index % count2, length[2], dilation[2], TILE[2])
    index //= count2
    group1, start1, n1 = _place(index % count1, length[1], dilation[1], TILE[1])
    index //= count1
    group0, start0, n0 = _place(index % count0, length[0], dilation[0], TILE[0])
    index //= count0
    head = (index % heads).to(tl.int64)
    image = (index // heads).to(tl.int64)
    return image, head, (group0, group1, group2), (start0, start1, start2), (n0, n1, n2)


@triton.jit
def _unravel(i, SIZES: tl.constexpr):
    return i // (SIZES[1] * SIZES[2]), i // SIZES[2] % SIZES[1], i % SIZES[2]


@triton.jit
def _plus(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def _rows_of(x):
    """Return the vectors of three axes as rows, which go along the second axis of a matrix of pairs."""
    return x[0][None, :], x[1][None, :], x[2][None, :]


@triton.jit
def _columns_of(x):
    """Return the vectors of three axes as columns, which go along the first axis of a matrix of pairs."""
    return x[0][:, None], x[1][:, None], x[2][:, None]


@triton.jit
def _within(p, limits):
    return (p[0] <= limits[0]) & (p[1] <= limits[1]) & (p[2] <= limits[2])


@triton.jit
def _axis_window(p, n, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the first and the last key that position ``p`` of ``n`` sees; `window.axis_ranges` is the definition."""
    if CAUSAL:
        leader = tl.minimum(p // STRIDE * STRIDE + STRIDE - 1, n - 1)
        return tl.maximum(leader - KERNEL + 1, 0), p
    else:
        leader = tl.minimum(p // STRIDE * STRIDE + STRIDE // 2, n - 1)
        first = tl.minimum(tl.maximum(leader - KERNEL // 2, 0), n - KERNEL)
        return first, first + KERNEL - 1


@triton.jit
def _windows(p, n, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the first and the last keys that positions see."""
    first0, last0 = _axis_window(p[0], n[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    first1, last1 = _axis_window(p[1], n[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    first2, last2 = _axis_window(p[2], n[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    return (first0, first1, first2), (last0, last1, last2)


@triton.jit
def _axis_keys_of_tile(
    start, n, TILE: tl.constexpr, BOX: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    low, _ = _axis_window(tl.minimum(start, n - 1), n, KERNEL, STRIDE, CAUSAL)
    _, high = _axis_window(tl.minimum(start + TILE - 1, n - 1), n, KERNEL, STRIDE, CAUSAL)
    return low, high, tl.cdiv(high - low + 1, BOX)


@triton.jit
def _keys_of_tile(
    start, n, TILE: tl.constexpr, BOX: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    """Return the first and the last key that a tile of queries sees, and how many boxes hold them."""
    low0, high0, boxes0 = _axis_keys_of_tile(start[0], n[0], TILE[0], BOX[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    low1, high1, boxes1 = _axis_keys_of_tile(start[1], n[1], TILE[1], BOX[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    low2, high2, boxes2 = _axis_keys_of_tile(start[2], n[2], TILE[2], BOX[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    return (low0, low1, low2), (high0, high1, high2), (boxes0, boxes1, boxes2)


@triton.jit
def _axis_queries_of_tile(
    start, n, TILE: tl.constexpr, BOX: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    start = tl.minimum(start, n - 1)
    end = tl.minimum(start + TILE - 1, n - 1)
    if CAUSAL:
        low = start
        high = end + KERNEL - 1
    else:
        # At a border all queries share the window that ends there.
        low = tl.where(start < KERNEL, 0, start - KERNEL + 1 + KERNEL // 2 - STRIDE // 2)
        high = tl.where(end >= n - KERNEL, n - 1, end + KERNEL // 2 + STRIDE - 1 - STRIDE // 2)
    low = tl.maximum(low, 0)
    high = tl.minimum(high, n - 1)
    return low, high, tl.cdiv(high - low + 1, BOX)


@triton.jit
def _queries_of_tile(
    start, n, TILE: tl.constexpr, BOX: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    """Return the first and the last query that see some key of a tile, and how many boxes hold them."""
    low0, high0, boxes0 = _axis_queries_of_tile(start[0], n[0], TILE[0], BOX[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    low1, high1, boxes1 = _axis_queries_of_tile(start[1], n[1], TILE[1], BOX[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    low2, high2, boxes2 = _axis_queries_of_tile(start[2], n[2], TILE[2], BOX[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    return (low0, low1, low2), (high0, high1, high2), (boxes0, boxes1, boxes2)


@triton.jit
def _queries(start, n, TILE: tl.constexpr):
    """Return the positions of a tile's queries, and which of them exist.

    A query beyond the map repeats the last one, so that its window is a sound one; it is not stored.
    """
    p = _plus(start, _unravel(tl.arange(0, TILE[0] * TILE[1] * TILE[2]), TILE))
    exists = (p[0] < n[0]) & (p[1] < n[1]) & (p[2] < n[2])
    return (tl.minimum(p[0], n[0] - 1), tl.minimum(p[1], n[1] - 1), tl.minimum(p[2], n[2] - 1)), exists


@triton.jit
def _box(i, low, boxes, BOX: tl.constexpr):
    """Return the first positions of box ``i``."""
    return (
        low[0] + i // (boxes[1] * boxes[2]) * BOX[0],
        low[1] + i // boxes[2] % boxes[1] * BOX[1],
        low[2] + i % boxes[2] * BOX[2],
    )


@triton.jit
def _axis_sees(key, first, last, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """Return whether keys lie in windows on one axis, by a single unsigned comparison."""
    distance = (key - first).to(tl.uint32, bitcast=True)
    if CAUSAL:
        return distance <= (last - first).to(tl.uint32, bitcast=True)
    else:
        return distance < KERNEL


@triton.jit
def _sees(inside, key, first, last, TILE: tl.constexpr, BOX: tl.constexpr, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """Return which pairs are ``inside`` and of a key in the query's window."""
    seen = inside
    if TILE[0] * BOX[0] > 1:
        seen &= _axis_sees(key[0], first[0], last[0], KERNEL[0], CAUSAL[0])
    if TILE[1] * BOX[1] > 1:
        seen &= _axis_sees(key[1], first[1], last[1], KERNEL[1], CAUSAL[1])
    if TILE[2] * BOX[2] > 1:
        seen &= _axis_sees(key[2], first[2], last[2], KERNEL[2], CAUSAL[2])
    return seen


@triton.jit
def _entry(p, KERNEL: tl.constexpr):
    """Return the entry of a flat bias table: of a key's position less that of a query, plus `_middle`."""
    return (p[0] * (2 * KERNEL[1] - 1) + p[1]) * (2 * KERNEL[2] - 1) + p[2]


@triton.jit
def _middle(KERNEL: tl.constexpr):
    return KERNEL[0] - 1, KERNEL[1] - 1, KERNEL[2] - 1


@triton.jit
def _entries(KERNEL: tl.constexpr):
    """Return the entries of a head's bias."""
    return (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)


@triton.jit
def _address(p, groups, dilation, strides):
    """Return where positions of a dilation group lie; ``strides`` are those of batch, three axes and head."""
    group = (
        groups[0].to(tl.int64) * strides[1] + groups[1].to(tl.int64) * strides[2] + groups[2].to(tl.int64) * strides[3]
    )
    return group + _distance(p, dilation, strides)


@triton.jit
def _distance(i, dilation, strides):
    """Return how far apart positions lie that differ by ``i``."""
    return (
        i[0].to(tl.int64) * dilation[0] * strides[1]
        + i[1].to(tl.int64) * dilation[1] * strides[2]
        + i[2].to(tl.int64) * dilation[2] * strides[3]
    )


@triton.jit
def _address_in(image, head, p, groups, dilation, strides):
    """Return where positions of an image and head lie."""
    return _address(p, groups, dilation, strides) + image * strides[0] + head * strides[4]


@triton.jit
def _rows(pointer, address, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Load vectors of ``DIM`` channels, padded by zeros to ``BLOCK_DIM``."""
    d = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None] if DIM == BLOCK_DIM else inside[:, None] & (d < DIM)[None, :]
    return tl.load(pointer + address[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(pointer, address, inside, x, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    d = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None] & (d < DIM)[None, :]
    tl.store(pointer + address[:, None] + d[None, :], x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    rpb,
    out,
    lse,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    lse_strides,
    length,
    dilation,
    heads,
    heads_per_key,
    scale_log2,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write output and log-sum-exp (natural logarithm) of a tile of queries. ``rpb`` comes times log2(e)."""
    M: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    N: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    image, head, groups, start, n = _tile(length, dilation, heads, TILE)
    low, high, boxes = _keys_of_tile(start, n, TILE, BOX, KERNEL, STRIDE, CAUSAL)
    p, exists = _queries(start, n, TILE)
    first, last = _windows(p, n, KERNEL, STRIDE, CAUSAL)
    at = _address_in(image, head, p, groups, dilation, query_strides)
    q = _rows(query, at, exists, DIM, BLOCK_DIM)

    j = _unravel(tl.arange(0, N), BOX)
    key += image * key_strides[0] + head // heads_per_key * key_strides[4]
    value += image * value_strides[0] + head // heads_per_key * value_strides[4]
    key_rows = _distance(j, dilation, key_strides)
    value_rows = _distance(j, dilation, value_strides)
    if BIAS:
        rpb += head * _entries(KERNEL)
        own = _entry(p, KERNEL) - _entry(_middle(KERNEL), KERNEL)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DIM_V], tl.float32)
    for i in range(0, boxes[0] * boxes[1] * boxes[2]):
        base = _box(i, low, boxes, BOX)
        k_at = _plus(base, j)
        inside = _within(k_at, high)
        k = _rows(key + _address(base, groups, dilation, key_strides), key_rows, inside, DIM, BLOCK_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        seen = _sees(inside[None, :], _rows_of(k_at), _columns_of(first), _columns_of(last), TILE, BOX, KERNEL, CAUSAL)
        if BIAS:
            scores += tl.load(rpb + (_entry(k_at, KERNEL)[None, :] - own[:, None]), mask=seen, other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A query may see no key of the first boxes.
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(weights, 1)
        v = _rows(
            value + _address(base, groups, dilation, value_strides),
            value_rows,
            inside,
            DIM_V,
            BLOCK_DIM_V,
        )
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    at = _address_in(image, head, p, groups, dilation, out_strides)
    _store_rows(out, at, exists, acc / total[:, None], DIM_V, BLOCK_DIM_V)
    at = _address_in(image, head, p, groups, dilation, lse_strides)
    tl.store(lse + at, (top + tl.log2(total)) * _LN2, mask=exists)


@triton.jit
def backward_query_kernel(
    query,
    key,
    value,
    rpb,
    out,
    lse,
    grad_out,
    grad_lse,
    delta,
    grad_query,
    grad_rpb,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    lse_strides,
    grad_out_strides,
    grad_query_strides,
    length,
    dilation,
    heads,
    heads_per_key,
    scale,
    scale_log2,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    LSE_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of a tile of queries, their ``delta``, and what they add to the gradient of the bias.

    ``delta`` is what a score's gradient lacks besides its weight: output times gradient, less the gradient of the
    log-sum-exp. ``grad_rpb`` is ``[programs, ROWS, COLUMNS]``; rows are the entries of the first two axes.
    """
    M: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    N: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    image, head, groups, start, n = _tile(length, dilation, heads, TILE)
    low, high, boxes = _keys_of_tile(start, n, TILE, BOX, KERNEL, STRIDE, CAUSAL)
    p, exists = _queries(start, n, TILE)
    first, last = _windows(p, n, KERNEL, STRIDE, CAUSAL)
    at = _address_in(image, head, p, groups, dilation, query_strides)
    q = _rows(query, at, exists, DIM, BLOCK_DIM)
    at = _address_in(image, head, p, groups, dilation, out_strides)
    o = _rows(out, at, exists, DIM_V, BLOCK_DIM_V)
    at = _address_in(image, head, p, groups, dilation, grad_out_strides)
    g = _rows(grad_out, at, exists, DIM_V, BLOCK_DIM_V)
    at = _address_in(image, head, p, groups, dilation, lse_strides)
    lse2 = tl.load(lse + at, mask=exists, other=0.0) * _LOG2E
    lack = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if LSE_GRAD:
        lack -= tl.load(grad_lse + at, mask=exists, other=0.0)
    tl.store(delta + at, lack, mask=exists)

    j = _unravel(tl.arange(0, N), BOX)
    key += image * key_strides[0] + head // heads_per_key * key_strides[4]
    value += image * value_strides[0] + head // heads_per_key * value_strides[4]
    key_rows = _distance(j, dilation, key_strides)
    value_rows = _distance(j, dilation, value_strides)
    if BIAS:
        rpb += head * _entries(KERNEL)
        own = _entry(p, KERNEL) - _entry(_middle(KERNEL), KERNEL)
    if BIAS_GRAD:
        QUERY_ROWS: tl.constexpr = TILE[0] * TILE[1]
        KEY_ROWS: tl.constexpr = BOX[0] * BOX[1]
        slot = tl.arange(0, KEY_ROWS * COLUMNS)
        # Where in a box of keys the key of each row lies that a query reaches by the bias's column.
        reached = p[2][:, None] + (slot % COLUMNS)[None, :] - KERNEL[2] + 1
        row_pair = tl.arange(0, QUERY_ROWS * KEY_ROWS)
        row_entry0 = row_pair % KEY_ROWS // BOX[1] - row_pair // KEY_ROWS // TILE[1] + KERNEL[0] - 1 - start[0]
        row_entry1 = row_pair % KEY_ROWS % BOX[1] - row_pair // KEY_ROWS % TILE[1] + KERNEL[1] - 1 - start[1]
        table = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc = tl.zeros([M, BLOCK_DIM], tl.float32)
    for i in range(0, boxes[0] * boxes[1] * boxes[2]):
        base = _box(i, low, boxes, BOX)
        k_at = _plus(base, j)
        inside = _within(k_at, high)
        k = _rows(key + _address(base, groups, dilation, key_strides), key_rows, inside, DIM, BLOCK_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        seen = _sees(inside[None, :], _rows_of(k_at), _columns_of(first), _columns_of(last), TILE, BOX, KERNEL, CAUSAL)
        if BIAS:
            scores += tl.load(rpb + (_entry(k_at, KERNEL)[None, :] - own[:, None]), mask=seen, other=0.0)
        weights = tl.where(seen, tl.exp2(scores - lse2[:, None]), 0.0)
        v = _rows(
            value + _address(base, groups, dilation, value_strides),
            value_rows,
            inside,
            DIM_V,
            BLOCK_DIM_V,
        )
        grad_scores = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - lack[:, None])
        acc += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
        if BIAS_GRAD:
            # Skew: from keys to the bias's columns, then add up the queries of a row.
            column = reached - base[2]
            hit = exists[:, None] & (column >= 0) & (column < BOX[2])
            source = (slot // COLUMNS * BOX[2])[None, :] + tl.where(hit, column, 0)
            skewed = tl.where(hit, tl.gather(grad_scores, source, 1), 0.0)
            rows = tl.sum(tl.reshape(skewed, [QUERY_ROWS, TILE[2], KEY_ROWS * COLUMNS]), 1)
            rows = tl.reshape(rows, [QUERY_ROWS * KEY_ROWS, COLUMNS])
            if ROWS == 1:
                table += tl.sum(rows, 0)[None, :]
            else:
                row = (row_entry0 + base[0]) * (2 * KERNEL[1] - 1) + row_entry1 + base[1]
                # Rows out of the window hold zeros, wherever they point.
                one_hot = tl.arange(0, ROWS)[:, None] == row[None, :]
                if QUERY_ROWS * KEY_ROWS < 16:
                    # A sum of products would be compiled to a product of matrices, in tf32, and wrong below 8 rows.
                    table += tl.sum(tl.where(one_hot[:, :, None], rows[None, :, :], 0.0), 1)
                else:
                    table += tl.dot(tl.where(one_hot, 1.0, 0.0), rows, input_precision="ieee")
    at = _address_in(image, head, p, groups, dilation, grad_query_strides)
    _store_rows(grad_query, at, exists, acc * scale, DIM, BLOCK_DIM)
    if BIAS_GRAD:
        at = tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS)
        at += tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(grad_rpb + at, table)


@triton.jit
def backward_key_value_kernel(
    query,
    key,
    value,
    rpb,
    lse,
    grad_out,
    delta,
    grad_key,
    grad_value,
    query_strides,
    key_strides,
    value_strides,
    lse_strides,
    grad_out_strides,
    grad_key_strides,
    grad_value_strides,
    length,
    dilation,
    heads,
    heads_per_key,
    scale,
    scale_log2,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of a tile of keys and values: a walk over the queries that see them, of all their heads."""
    M: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    N: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    image, key_head, groups, start, n = _tile(length, dilation, heads // heads_per_key, TILE)
    low, high, boxes = _queries_of_tile(start, n, TILE, BOX, KERNEL, STRIDE, CAUSAL)
    k_at = _plus(start, _unravel(tl.arange(0, M), TILE))
    exists = (k_at[0] < n[0]) & (k_at[1] < n[1]) & (k_at[2] < n[2])
    at = _address_in(image, key_head, k_at, groups, dilation, key_strides)
    k = _rows(key, at, exists, DIM, BLOCK_DIM)
    at = _address_in(image, key_head, k_at, groups, dilation, value_strides)
    v = _rows(value, at, exists, DIM_V, BLOCK_DIM_V)

    j = _unravel(tl.arange(0, N), BOX)
    query += image * query_strides[0]
    grad_out += image * grad_out_strides[0]
    lse += image * lse_strides[0]
    delta += image * lse_strides[0]
    query_rows = _distance(j, dilation, query_strides)
    grad_out_rows = _distance(j, dilation, grad_out_strides)
    lse_rows = _distance(j, dilation, lse_strides)
    if BIAS:
        own = _entry(k_at, KERNEL) + _entry(_middle(KERNEL), KERNEL)
    acc_k = tl.zeros([M, BLOCK_DIM], tl.float32)
    acc_v = tl.zeros([M, BLOCK_DIM_V], tl.float32)
    count = boxes[0] * boxes[1] * boxes[2]
    for step in range(0, heads_per_key * count):
        head = key_head * heads_per_key + step // count
        base = _box(step % count, low, boxes, BOX)
        p = _plus(base, j)
        inside = _within(p, high)
        to = _address(base, groups, dilation, query_strides) + head * query_strides[4]
        q = _rows(query + to, query_rows, inside, DIM, BLOCK_DIM)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
        first, last = _windows(p, n, KERNEL, STRIDE, CAUSAL)
        seen = _sees(inside[None, :], _columns_of(k_at), _rows_of(first), _rows_of(last), TILE, BOX, KERNEL, CAUSAL)
        if BIAS:
            biases = rpb + head * _entries(KERNEL)
            scores += tl.load(biases + (own[:, None] - _entry(p, KERNEL)[None, :]), mask=seen, other=0.0)
        to = _address(base, groups, dilation, lse_strides) + head * lse_strides[4]
        lse2 = tl.load(lse + to + lse_rows, mask=inside, other=0.0) * _LOG2E
        lack = tl.load(delta + to + lse_rows, mask=inside, other=0.0)
        weights = tl.where(seen, tl.exp2(scores - lse2[None, :]), 0.0)
        to = _address(base, groups, dilation, grad_out_strides) + head * grad_out_strides[4]
        g = _rows(grad_out + to, grad_out_rows, inside, DIM_V, BLOCK_DIM_V)
        acc_v += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        grad_scores = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - lack[None, :])
        acc_k += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)

    at = _address_in(image, key_head, k_at, groups, dilation, grad_key_strides)
    _store_rows(grad_key, at, exists, acc_k * scale, DIM, BLOCK_DIM)
    at = _address_in(image, key_head, k_at, groups, dilation, grad_value_strides)
    _store_rows(grad_value, at, exists, acc_v, DIM_V, BLOCK_DIM_V)
