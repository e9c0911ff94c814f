"""Attention, backward: the gradient of a learned bias on the scores.

The gradient of a bias is dZ = P (dP - delta), summed over whatever the bias is broadcast over. Each
program recomputes the tiles it needs and sums them in registers, so nothing is added atomically:

    dense     a program owns one tile of [B or 1, H or 1, T, S] and walks over the batch rows and
              heads that share it
    bucket    a T5 bias depends on the distance only, which along a diagonal of square tiles is the
              same tile of distances again and again: a program owns one such diagonal of one row
              and head, and sorts its sum into buckets at the end

Shapes: as in attention/forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanolm.kernels.attention.backward import load_row, weights_and_gradient
from nanolm.kernels.tiles import head_pointer, load_tile


@triton.jit
def score_gradient(
    q, k, v, grad_out, lse, delta, batch, head, first, start, shape, masks, bias, scores, dropout,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dZ [M, N] of one tile of one head, 0 where the mask forbids."""
    t = first + tl.arange(0, M)[:, None]
    s = start + tl.arange(0, N)[None, :]
    q_head, grad_head = head_pointer(q, batch, head), head_pointer(grad_out, batch, head)
    k_head, v_head = head_pointer(k, batch, head // GROUP), head_pointer(v, batch, head // GROUP)
    q_tile = load_tile(q, q_head, first, shape.n_queries, WIDTH, M, COLUMNS, True)
    grad_tile = load_tile(grad_out, grad_head, first, shape.n_queries, WIDTH, M, COLUMNS, True)
    k_tile = load_tile(k, k_head, start, shape.n_keys, WIDTH, N, COLUMNS, True)
    v_tile = load_tile(v, v_head, start, shape.n_keys, WIDTH, N, COLUMNS, True)
    row = batch * shape.n_heads + head
    dots = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    dots_value = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
    _, grad_score, _ = weights_and_gradient(
        dots, dots_value, load_row(lse, row, first, shape, M)[:, None],
        load_row(delta, row, first, shape, M)[:, None], batch, head, t, s, shape, masks, bias,
        scores, dropout, CAUSAL, STRICT, BIAS, SOFTCAP, True,
    )  # fmt: skip
    return grad_score


@triton.jit
def attention_dense_bias_kernel(
    q, k, v, grad_out, lse, delta, grad_bias, shape, masks, bias, scores, dropout, n_rows,
    n_bias_rows, n_bias_heads,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the bias's gradient, over the rows and heads that share it."""
    n_key_tiles = tl.cdiv(shape.n_keys, N)
    n_tiles = n_key_tiles * tl.cdiv(shape.n_queries, M)
    first = tl.program_id(0) % n_tiles // n_key_tiles * M
    start = tl.program_id(0) % n_key_tiles * N
    own = tl.program_id(0) // n_tiles
    own_batch, own_head = own // n_bias_heads, own % n_bias_heads
    total = tl.zeros([M, N], ACCUMULATE)
    # Rows and heads that share the tile, in one program: the sum stays in registers, and no order
    # of additions is left to chance.
    for batch in range(own_batch, n_rows, n_bias_rows):
        for head in range(own_head, shape.n_heads, n_bias_heads):
            total += score_gradient(
                q, k, v, grad_out, lse, delta, batch, head, first, start, shape, masks, bias,
                scores, dropout, GROUP, WIDTH, COLUMNS, CAUSAL, STRICT, BIAS, SOFTCAP, PRECISION,
                M, N,
            )  # fmt: skip
    t = first + tl.arange(0, M)[:, None]
    s = start + tl.arange(0, N)[None, :]
    at = (tl.cast(own, tl.int64) * shape.n_queries + t) * shape.n_keys + s
    tl.store(grad_bias + at, total, mask=(t < shape.n_queries) & (s < shape.n_keys))


@triton.jit
def attention_bucket_bias_kernel(
    q, k, v, grad_out, lse, delta, buckets, grad_table, shape, masks, bias, scores, dropout,
    n_buckets,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program: the tiles (i, j) with i - j = one diagonal, of one row and head, by bucket.

    grad_table is [diagonals, B * H, buckets]; the caller sums over diagonals and rows.
    """
    n_query_tiles, n_key_tiles = tl.cdiv(shape.n_queries, M), tl.cdiv(shape.n_keys, M)
    n_diagonals = n_query_tiles + n_key_tiles - 1
    diagonal = tl.program_id(0) % n_diagonals - (n_key_tiles - 1)
    row = tl.program_id(0) // n_diagonals
    batch, head = row // shape.n_heads, row % shape.n_heads
    total = tl.zeros([M, M], ACCUMULATE)
    # Along a diagonal t - s is the same for the same place in each tile, so the tiles are added
    # before anything is sorted into buckets.
    for i in range(tl.maximum(diagonal, 0), tl.minimum(n_query_tiles, n_key_tiles + diagonal)):
        total += score_gradient(
            q, k, v, grad_out, lse, delta, batch, head, i * M, (i - diagonal) * M, shape, masks,
            bias, scores, dropout, GROUP, WIDTH, COLUMNS, CAUSAL, STRICT, BIAS, SOFTCAP, PRECISION,
            M, M,
        )  # fmt: skip
    difference = diagonal * M + tl.arange(0, M)[:, None] - tl.arange(0, M)[None, :]  # t - s
    index = difference + shape.n_keys - 1
    inside = (index >= 0) & (index < shape.n_queries + shape.n_keys - 1)
    bucket_tile = tl.load(buckets + index, mask=inside, other=-1)
    n_rows = tl.num_programs(0) // n_diagonals
    own = tl.program_id(0) % n_diagonals * n_rows + row
    # A loop over the buckets instead of a scatter: it needs no atomic addition, and runs once a
    # program.
    for bucket in range(0, n_buckets):
        part = tl.sum(tl.sum(tl.where(bucket_tile == bucket, total, 0.0), axis=1), axis=0)
        tl.store(grad_table + tl.cast(own, tl.int64) * n_buckets + bucket, part)
