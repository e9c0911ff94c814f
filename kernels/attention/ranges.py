"""Which tiles an attention kernel visits: those that a mask rules out are skipped, not computed.

A program owns some queries (or some keys) and asks here which keys (or queries) matter to it. The
answer is four numbers on tile boundaries,

    begin <= full_begin <= full_end <= end      outside [begin, end): skipped
                                                inside [full_begin, full_end): no mask is needed

so every loop runs twice, without and with the mask. For causal masks, windows, prefixes and lengths
the range is arithmetic; for documents and permutation orders one scan over the other side's numbers
finds the first and the last that could match.

Shapes: B batch, T queries, S keys; a tile has M queries and N keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCAN = tl.constexpr(1024)  # how many document or order numbers one step of a scan reads


@triton.jit
def matching_range(
    ids, other_ids, order, other_order, begin, end, first, length, IS_KEY: tl.constexpr,
    STRICT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Narrows [begin, end) to what rows first … first + ROWS could see by documents and order.

    Ranges of document numbers that do not meet hold no equal pair, and a key whose order is after
    that of every query is seen by none. With `IS_KEY` the rows are keys and the others queries.
    """
    row = tl.minimum(first + tl.arange(0, ROWS), length - 1)
    lowest = end
    highest = begin
    if ids is not None:
        mine = tl.load(ids + row)
        doc_min = tl.min(mine, axis=0)
        doc_max = tl.max(mine, axis=0)
    if order is not None:
        if IS_KEY:
            bound = tl.min(tl.load(order + row), axis=0)
        else:
            bound = tl.max(tl.load(order + row), axis=0)
    # The whole other side is read, in steps of SCAN: T numbers a program, against a tile's M x K:
    # little beside the tiles that it saves.
    for start in range(begin, end, SCAN):
        other = start + tl.arange(0, SCAN)
        match = other < end
        if ids is not None:
            theirs = tl.load(other_ids + other, mask=other < end, other=0)
            match = match & (theirs >= doc_min) & (theirs <= doc_max)
        if order is not None:
            theirs = tl.load(other_order + other, mask=other < end, other=0)
            if IS_KEY:
                match = match & ((theirs > bound) if STRICT else (theirs >= bound))
            else:
                match = match & ((theirs < bound) if STRICT else (theirs <= bound))
        lowest = tl.minimum(lowest, tl.min(tl.where(match, other, end), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(match, other + 1, begin), axis=0))
    return lowest, highest


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
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
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
        query_row = tl.cast(batch, tl.int64) * shape.n_queries
        key_row = tl.cast(batch, tl.int64) * shape.n_keys
        begin, end = matching_range(
            masks.documents + query_row if masks.documents is not None else None,
            masks.key_documents + key_row if masks.documents is not None else None,
            masks.order + query_row if masks.order is not None else None,
            masks.key_order + key_row if masks.order is not None else None,
            begin, end, first, shape.n_queries, False, STRICT, M,
        )  # fmt: skip
    return split_range(begin, full_begin, tl.maximum(full_end, 0), tl.maximum(end, 0), N)


@triton.jit
def query_range(
    masks, batch, first, shape,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
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
        query_row = tl.cast(batch, tl.int64) * shape.n_queries
        key_row = tl.cast(batch, tl.int64) * shape.n_keys
        begin, end = matching_range(
            masks.key_documents + key_row if masks.documents is not None else None,
            masks.documents + query_row if masks.documents is not None else None,
            masks.key_order + key_row if masks.order is not None else None,
            masks.order + query_row if masks.order is not None else None,
            begin, end, first, shape.n_keys, True, STRICT, N,
        )  # fmt: skip
    return split_range(begin, full_begin, tl.maximum(full_end, 0), tl.maximum(end, 0), M)
