"""Attention, backward: gradients of q, k, v and of the bias, recomputed tile by tile.

With weights P = exp(score - lse), out = P v and the incoming gradient dO (Dao 2023, section 3.1.2):

    dV = P^T dO            dP = dO v^T            delta_t = dO_t . out_t - d lse_t
    dZ = P (dP - delta)    the gradient of the score, and so of an additive bias
    dX = dZ * softcap'     the gradient of q . k * scale
    dQ = scale dX k        dK = scale dX^T q

because d softmax = P (dP - sum_s P dP), and sum_s P_ts dP_ts = dO_t . sum_s P_ts v_s, which is
dO_t . out_t. The gradient of lse_t by score_ts is P_ts, hence the last term of delta. With dropout,
P stands for the weights after it in dV, and dP is masked and scaled as the weights were.

Each output element is written by one program, once: nothing is added atomically, so two runs give
the same bits. Keys walk along queries for dK and dV (summing the query heads of a group in turn),
queries walk along keys for dQ, and the bias, if it learns, has a walk of its own.

Shapes: as in attention/forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanolm.kernels.attention.ranges import key_range, query_range
from nanolm.kernels.attention.scores import LOG2E, kept, scores_tile
from nanolm.kernels.tiles import head_pointer, load_tile, store_tile


@triton.jit
def attention_delta_kernel(
    out, grad_out, grad_lse, delta, shape,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """delta_t = dO_t . out_t - d lse_t for M queries of one head."""
    n_tiles = tl.cdiv(shape.n_queries, M)
    first = tl.program_id(0) % n_tiles * M
    row = tl.program_id(0) // n_tiles
    batch, head = row // shape.n_heads, row % shape.n_heads
    out_tile = load_tile(
        out, head_pointer(out, batch, head), first, shape.n_queries, WIDTH, M, COLUMNS, True
    )
    grad_tile = load_tile(
        grad_out,
        head_pointer(grad_out, batch, head),
        first,
        shape.n_queries,
        WIDTH,
        M,
        COLUMNS,
        True,
    )
    # Once a query, here, instead of once a pair of tiles: sum_s P_ts dP_ts is dO_t . out_t, which
    # needs no keys.
    total = tl.sum(out_tile.to(ACCUMULATE) * grad_tile.to(ACCUMULATE), axis=1)
    t = first + tl.arange(0, M)
    at = tl.cast(row, tl.int64) * shape.n_queries + t
    if grad_lse is not None:
        total -= tl.load(grad_lse + at, mask=t < shape.n_queries, other=0.0)
    tl.store(delta + at, total, mask=t < shape.n_queries)


@triton.jit
def weights_and_gradient(
    dots, dots_value, lse_tile, delta_tile, batch, head, t, s, shape, masks, bias, scores, dropout,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """(P after dropout, dZ, dX) of a tile from q . k and dO . v; t and s give its orientation."""
    score, slope = scores_tile(
        dots, batch, head, t, s, shape, masks, bias, scores, CAUSAL, STRICT, BIAS, SOFTCAP, CHECKED
    )
    # The forward pass's weights again, from scores and one number a query: q . k once more costs a
    # product of tiles, keeping the weights would cost T x S numbers a head.
    # A query without any key has lse = -inf; its scores are all -inf too, and its weights 0.
    weight = tl.exp2(score - tl.where(lse_tile == float("-inf"), 0.0, lse_tile * LOG2E))
    dropped = weight
    grad_weight = dots_value
    if dropout.seed is not None:
        keep = kept(dropout, batch, head, t, s)
        dropped = tl.where(keep, weight * dropout.scale, 0.0)
        grad_weight = tl.where(keep, dots_value * dropout.scale, 0.0)
    grad_score = weight * (grad_weight - delta_tile)
    grad_dots = grad_score
    if SOFTCAP:
        grad_dots = grad_score * slope
    return dropped, grad_score, grad_dots


@triton.jit
def load_row(pointer, row, first, shape, M: tl.constexpr):
    """[M] of a contiguous [B * H, T] tensor, 0 outside."""
    t = first + tl.arange(0, M)
    at = tl.cast(row, tl.int64) * shape.n_queries + t
    return tl.load(pointer + at, mask=t < shape.n_queries, other=0.0)


@triton.jit
def key_value_tile(
    grads, k_tile, v_tile, q, grad_out, lse, delta, batch, head, first, start, shape, masks, bias,
    scores, dropout,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """(dK, dV) of N keys after one more tile of queries; tiles here are [N, M]."""
    grad_k, grad_v = grads
    row = batch * shape.n_heads + head
    t = start + tl.arange(0, M)[None, :]
    s = first + tl.arange(0, N)[:, None]
    q_head = head_pointer(q, batch, head)
    grad_head = head_pointer(grad_out, batch, head)
    q_tile = load_tile(q, q_head, start, shape.n_queries, WIDTH, M, COLUMNS, CHECKED)
    grad_tile = load_tile(grad_out, grad_head, start, shape.n_queries, WIDTH, M, COLUMNS, CHECKED)
    lse_tile = load_row(lse, row, start, shape, M)[None, :]
    delta_tile = load_row(delta, row, start, shape, M)[None, :]
    # Transposed, [keys, queries]: then P^T dO and dX^T q are products of tiles as they lie in
    # registers, and no weight has to be transposed.
    dots = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
    dots_value = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
    weight, _, grad_dots = weights_and_gradient(
        dots, dots_value, lse_tile, delta_tile, batch, head, t, s, shape, masks, bias, scores,
        dropout, CAUSAL, STRICT, BIAS, SOFTCAP, CHECKED,
    )  # fmt: skip
    grad_v += tl.dot(weight.to(grad_tile.dtype), grad_tile, input_precision=PRECISION)
    grad_k += tl.dot(grad_dots.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def attention_key_value_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, shape, masks, bias, scores, dropout, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of N keys of one key/value head, over all queries of its group."""
    n_tiles = tl.cdiv(shape.n_keys, N)
    first = tl.program_id(0) % n_tiles * N
    row = tl.program_id(0) // n_tiles
    n_groups = shape.n_heads // GROUP
    batch, group = row // n_groups, row % n_groups
    k_head, v_head = head_pointer(k, batch, group), head_pointer(v, batch, group)
    k_tile = load_tile(k, k_head, first, shape.n_keys, WIDTH, N, COLUMNS, True)
    v_tile = load_tile(v, v_head, first, shape.n_keys, WIDTH, N, COLUMNS, True)
    sum_k = tl.zeros([N, COLUMNS], ACCUMULATE)
    sum_v = tl.zeros([N, COLUMNS], ACCUMULATE)

    begin, full_begin, full_end, end = query_range(masks, batch, first, shape, CAUSAL, M, N)
    n_before = (full_begin - begin) // M
    n_masked = n_before + tl.cdiv(end - full_end, M)
    # The heads of a group one after the other in the same program, because they share dK and dV:
    # their sum stays in registers and needs no atomic addition.
    for member in range(0, GROUP):
        head = group * GROUP + member
        # Without the mask, then with it: see attention_forward_kernel.
        for start in range(full_begin, full_end, M):
            sum_k, sum_v = key_value_tile(
                (sum_k, sum_v), k_tile, v_tile, q, grad_out, lse, delta, batch, head, first, start,
                shape, masks, bias, scores, dropout, WIDTH, COLUMNS, M, N, CAUSAL, STRICT, BIAS,
                SOFTCAP, PRECISION, False,
            )  # fmt: skip
        for tile in range(0, n_masked):
            start = tl.where(tile < n_before, begin + tile * M, full_end + (tile - n_before) * M)
            sum_k, sum_v = key_value_tile(
                (sum_k, sum_v), k_tile, v_tile, q, grad_out, lse, delta, batch, head, first, start,
                shape, masks, bias, scores, dropout, WIDTH, COLUMNS, M, N, CAUSAL, STRICT, BIAS,
                SOFTCAP, PRECISION, True,
            )  # fmt: skip

    grad_k_head = head_pointer(grad_k, batch, group)
    grad_v_head = head_pointer(grad_v, batch, group)
    # The scale of q . k is applied once to the sum, not to every tile.
    store_tile(grad_k, grad_k_head, sum_k * scale, first, shape.n_keys, WIDTH, N, COLUMNS)
    store_tile(grad_v, grad_v_head, sum_v, first, shape.n_keys, WIDTH, N, COLUMNS)


@triton.jit
def query_tile(
    grad, q_tile, grad_tile, lse_tile, delta_tile, k, v, k_head, v_head, batch, head, first, start,
    shape, masks, bias, scores, dropout,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """dQ / scale of M queries after one more tile of keys."""
    t = first + tl.arange(0, M)[:, None]
    s = start + tl.arange(0, N)[None, :]
    k_tile = load_tile(k, k_head, start, shape.n_keys, WIDTH, N, COLUMNS, CHECKED)
    v_tile = load_tile(v, v_head, start, shape.n_keys, WIDTH, N, COLUMNS, CHECKED)
    dots = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    dots_value = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
    _, _, grad_dots = weights_and_gradient(
        dots, dots_value, lse_tile[:, None], delta_tile[:, None], batch, head, t, s, shape, masks,
        bias, scores, dropout, CAUSAL, STRICT, BIAS, SOFTCAP, CHECKED,
    )  # fmt: skip
    return grad + tl.dot(grad_dots.to(k_tile.dtype), k_tile, input_precision=PRECISION)


@triton.jit
def attention_query_kernel(
    q, k, v, grad_out, lse, delta, grad_q, shape, masks, bias, scores, dropout, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: dQ of M queries of one head, over all their keys."""
    n_tiles = tl.cdiv(shape.n_queries, M)
    first = (n_tiles - 1 - tl.program_id(0) % n_tiles) * M
    row = tl.program_id(0) // n_tiles
    batch, head = row // shape.n_heads, row % shape.n_heads
    k_head = head_pointer(k, batch, head // GROUP)
    v_head = head_pointer(v, batch, head // GROUP)
    n_rows = shape.n_queries
    q_tile = load_tile(q, head_pointer(q, batch, head), first, n_rows, WIDTH, M, COLUMNS, True)
    grad_head = head_pointer(grad_out, batch, head)
    grad_tile = load_tile(grad_out, grad_head, first, n_rows, WIDTH, M, COLUMNS, True)
    lse_tile = load_row(lse, row, first, shape, M)
    delta_tile = load_row(delta, row, first, shape, M)
    total = tl.zeros([M, COLUMNS], ACCUMULATE)

    # dQ has a walk of its own along the keys. In the kernel above it would have to be added to
    # memory by many programs at once, in an order that differs from run to run.
    begin, full_begin, full_end, end = key_range(masks, batch, first, shape, CAUSAL, M, N)
    # Without the mask, then with it, as forward.
    for start in range(full_begin, full_end, N):
        total = query_tile(
            total, q_tile, grad_tile, lse_tile, delta_tile, k, v, k_head, v_head, batch, head,
            first, start, shape, masks, bias, scores, dropout, WIDTH, COLUMNS, M, N, CAUSAL, STRICT,
            BIAS, SOFTCAP, PRECISION, False,
        )  # fmt: skip
    n_before = (full_begin - begin) // N
    for tile in range(0, n_before + tl.cdiv(end - full_end, N)):
        start = tl.where(tile < n_before, begin + tile * N, full_end + (tile - n_before) * N)
        total = query_tile(
            total, q_tile, grad_tile, lse_tile, delta_tile, k, v, k_head, v_head, batch, head,
            first, start, shape, masks, bias, scores, dropout, WIDTH, COLUMNS, M, N, CAUSAL, STRICT,
            BIAS, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    grad_q_head = head_pointer(grad_q, batch, head)
    store_tile(grad_q, grad_q_head, total * scale, first, shape.n_queries, WIDTH, M, COLUMNS)
