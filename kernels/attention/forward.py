"""Attention, forward: softmax(q k^T * scale + bias + mask) v without ever holding [T, S].

The algorithm is FlashAttention-2 (Dao 2023, section 3.1). One program owns M queries of one head
and walks over the keys in tiles of N, carrying for every query

    m      the largest score so far
    l      sum_s exp(score_s - m)            over the keys so far
    acc    sum_s exp(score_s - m) v_s

When a new tile raises the maximum from m to m', what was summed before is multiplied by
exp(m - m'). At the end out = acc / l, and lse = m + log l is all that the backward pass needs to
compute the weights again. Tiles that the mask rules out are not visited; tiles that it leaves whole
are computed without it.

In a batch's journey: MultiHeadAttention.forward -> TritonAttention.run (kernels/candidates.py) ->
`attention` (operator.py) -> here.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width; a tile has
M queries and N keys, and `COLUMNS` is K rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanolm.kernels.attention.ranges import key_range
from nanolm.kernels.attention.scores import LN2, kept, scores_tile
from nanolm.kernels.tiles import head_pointer, load_tile, store_tile


@triton.jit
def attend_tile(
    state, q_tile, k, v, k_head, v_head, batch, head, first, start, shape, masks, bias, scores,
    dropout,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """(acc, m, l) after one more tile of keys."""
    acc, m, l = state
    t = first + tl.arange(0, M)[:, None]
    s = start + tl.arange(0, N)[None, :]
    k_tile = load_tile(k, k_head, start, shape.n_keys, WIDTH, N, COLUMNS, CHECKED)
    v_tile = load_tile(v, v_head, start, shape.n_keys, WIDTH, N, COLUMNS, CHECKED)
    dots = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    score, _ = scores_tile(
        dots, batch, head, t, s, shape, masks, bias, scores, CAUSAL, STRICT, BIAS, SOFTCAP, CHECKED
    )
    m_new = tl.maximum(m, tl.max(score, axis=1))
    # A query that has seen no key yet has m = -inf; -inf - (-inf) would be NaN.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    weight = tl.exp2(score - shift[:, None])
    shrink = tl.exp2(m - shift)
    # Summed before dropout: dropping acts on the normalised weights, whose sum is that of all of
    # them.
    l = l * shrink + tl.sum(weight, axis=1)
    if dropout.seed is not None:
        keep = kept(dropout, batch, head, t, s)
        weight = tl.where(keep, weight * dropout.scale, 0.0)
    # Weights lie in [0, 1], so 16 bits lose little; tensor cores multiply them and add in float32.
    update = tl.dot(weight.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    # What was summed relative to the old maximum, made relative to the new one. The division by l
    # waits for the end: one a query instead of one a tile.
    return acc * shrink[:, None] + update, m_new, l


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, shape, masks, bias, scores, dropout,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one head, all their keys."""
    n_tiles = tl.cdiv(shape.n_queries, M)
    # The last queries of a causal row see most keys: they start first.
    first = (n_tiles - 1 - tl.program_id(0) % n_tiles) * M
    row = tl.program_id(0) // n_tiles
    batch, head = row // shape.n_heads, row % shape.n_heads
    # GROUP query heads read one key head: no copy of it is made.
    k_head = head_pointer(k, batch, head // GROUP)
    v_head = head_pointer(v, batch, head // GROUP)
    q_tile = load_tile(
        q, head_pointer(q, batch, head), first, shape.n_queries, WIDTH, M, COLUMNS, True
    )
    # acc, m and l stay in registers through the whole walk: only keys and values come from memory.
    # That bounds M x K, and so the tiles in launch.py.
    acc = tl.zeros([M, COLUMNS], ACCUMULATE)
    m = tl.full([M], float("-inf"), ACCUMULATE)
    l = tl.zeros([M], ACCUMULATE)

    begin, full_begin, full_end, end = key_range(masks, batch, first, shape, CAUSAL, M, N)
    # Two loops over tiles. In this one every pair of a tile is allowed, so nothing is compared and
    # nothing is masked on loading: for long causal rows that is nearly all tiles. The next one has
    # the tiles before and behind them, on the boundaries of the mask. One loop with a test inside
    # would make every tile hold the masked path's registers.
    for start in range(full_begin, full_end, N):
        acc, m, l = attend_tile(
            (acc, m, l), q_tile, k, v, k_head, v_head, batch, head, first, start, shape, masks,
            bias, scores, dropout, WIDTH, COLUMNS, M, N, CAUSAL, STRICT, BIAS, SOFTCAP, PRECISION,
            False,
        )  # fmt: skip
    # The tiles on both sides in one loop, so that the masked path is compiled once.
    n_before = (full_begin - begin) // N
    for tile in range(0, n_before + tl.cdiv(end - full_end, N)):
        start = tl.where(tile < n_before, begin + tile * N, full_end + (tile - n_before) * N)
        acc, m, l = attend_tile(
            (acc, m, l), q_tile, k, v, k_head, v_head, batch, head, first, start, shape, masks,
            bias, scores, dropout, WIDTH, COLUMNS, M, N, CAUSAL, STRICT, BIAS, SOFTCAP, PRECISION,
            True,
        )  # fmt: skip

    seen = l > 0
    divisor = tl.where(seen, l, 1.0)
    out_head = head_pointer(out, batch, head)
    store_tile(out, out_head, acc / divisor[:, None], first, shape.n_queries, WIDTH, M, COLUMNS)
    t = first + tl.arange(0, M)
    # m and l in one number. It suffices: exp(score - lse) is the weight itself, without maximum,
    # sum or division, so the backward pass needs neither the weights [T, S] nor m and l apart.
    lse_tile = tl.where(seen, (m + tl.log2(divisor)) * LN2, float("-inf"))
    tl.store(lse + tl.cast(row, tl.int64) * shape.n_queries + t, lse_tile, mask=t < shape.n_queries)
