"""Which tiles an attention kernel visits: those that a mask rules out are skipped, not computed.

A program owns some queries (or some keys) and asks here which keys (or queries) matter to it. The
answer is four numbers on tile boundaries,

    begin <= full_begin <= full_end <= end      outside [begin, end): skipped
                                                inside [full_begin, full_end): no mask is needed

so every loop runs twice, without and with the mask. For causal masks, windows, prefixes and lengths
the range is arithmetic; for documents and permutation orders the batch brings, row by row, the
first and the last of the other side that could match (nanolm/ops/matching.py), and a program reads
those of its own rows.

Shapes: B batch, T queries, S keys; a tile has M queries and N keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matching_range(ranges, batch, first, length, begin, end, ROWS: tl.constexpr):
    """[begin, end), narrowed to what rows first … first + ROWS could match by documents and order;
    `ranges` is [B, 2, length] (nanolm.ops.matching)."""
    # Rows that stick out repeat the last one, so that they widen nothing. One without a match says
    # (all, 0), which widens nothing either.
    row = tl.minimum(first + tl.arange(0, ROWS), length - 1)
    at = ranges + tl.cast(batch, tl.int64) * 2 * length + row
    lowest = tl.min(tl.load(at), axis=0)
    highest = tl.max(tl.load(at + length), axis=0)
    return tl.maximum(begin, lowest), tl.minimum(end, highest)


@triton.jit
def split_range(begin, full_begin, full_end, end, STEP: tl.constexpr):
    """(begin, full_begin, full_end, end) on tile boundaries: tiles in [full_begin, full_end) need
    no mask, those in [begin, full_begin) and [full_end, end) do; all others are skipped."""
    begin = begin // STEP * STEP
    # The outer bounds are rounded outwards and the inner ones inwards: a tile that is partly free
    # of masks is one that needs them.
    full_begin = tl.maximum((full_begin + STEP - 1) // STEP * STEP, begin)
    full_end = full_end // STEP * STEP
    if full_end <= full_begin:
        full_begin = begin
        full_end = begin
    return begin, full_begin, full_end, tl.maximum(end, full_end)


@triton.jit
def key_range(
    masks, batch, first, shape,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Which keys the queries first … first + M - 1 may see, in tiles of N: see `split_range`."""
    low = first + (shape.n_keys - shape.n_queries)  # t' of the first and the last query
    high = tl.minimum(first + M, shape.n_queries) - 1 + (shape.n_keys - shape.n_queries)
    begin = first * 0
    end = begin + shape.n_keys
    full_begin = begin
    full_end = end
    if CAUSAL:
        prefix = begin
        if masks.prefix_lengths is not None:
            prefix = tl.load(masks.prefix_lengths + batch).to(tl.int32)
        end = tl.minimum(end, tl.maximum(high + 1, prefix))
        full_end = tl.minimum(full_end, tl.maximum(low + 1, prefix))
    if masks.window is not None:
        begin = tl.maximum(begin, low - masks.window + 1)
        end = tl.minimum(end, high + masks.window)
        full_begin = tl.maximum(full_begin, high - masks.window + 1)
        full_end = tl.minimum(full_end, low + masks.window)
    if masks.key_lengths is not None:
        length = tl.load(masks.key_lengths + batch).to(tl.int32)
        end = tl.minimum(end, length)
        full_end = tl.minimum(full_end, length)
    if masks.documents is not None or masks.order is not None:
        full_end = full_begin
    if masks.key_ranges is not None:
        begin, end = matching_range(masks.key_ranges, batch, first, shape.n_queries, begin, end, M)
    return split_range(begin, full_begin, tl.maximum(full_end, 0), tl.maximum(end, 0), N)


@triton.jit
def query_range(
    masks, batch, first, shape,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Which queries may see the keys first … first + N - 1, in tiles of M: see `split_range`."""
    shift = shape.n_keys - shape.n_queries
    low = first - shift  # the query that stands at the first and at the last key
    high = tl.minimum(first + N, shape.n_keys) - 1 - shift
    begin = first * 0
    end = begin + shape.n_queries
    full_begin = begin
    full_end = end
    if CAUSAL:
        see_first = low  # the first query that sees the first key, and the last key
        see_last = high
        if masks.prefix_lengths is not None:
            prefix = tl.load(masks.prefix_lengths + batch).to(tl.int32)
            see_first = tl.where(low + shift < prefix, 0, see_first)
            see_last = tl.where(high + shift < prefix, 0, see_last)
        begin = tl.maximum(begin, see_first)
        full_begin = tl.maximum(full_begin, see_last)
    if masks.window is not None:
        begin = tl.maximum(begin, low - masks.window + 1)
        end = tl.minimum(end, high + masks.window)
        full_begin = tl.maximum(full_begin, high - masks.window + 1)
        full_end = tl.minimum(full_end, low + masks.window)
    n_whole = shape.n_keys  # a tile that sticks out of the keys is never free of masks
    if masks.key_lengths is not None:
        length = tl.load(masks.key_lengths + batch).to(tl.int32)
        n_whole = tl.minimum(n_whole, length)
        end = tl.where(first < length, end, 0)
    full_end = tl.where(first + N <= n_whole, full_end, 0)
    if masks.documents is not None or masks.order is not None:
        full_end = full_begin
    if masks.query_ranges is not None:
        begin, end = matching_range(masks.query_ranges, batch, first, shape.n_keys, begin, end, N)
    return split_range(begin, full_begin, tl.maximum(full_end, 0), tl.maximum(end, 0), M)
