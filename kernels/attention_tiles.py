"""What all attention kernels share: one tile of scores, who may see whom in it, which tiles matter.

A tile is M queries by N keys. Its scores are kept in units of log2, because the GPU has exp2:

    score = log2(e) * (softcap(q . k * scale) + bias),   -inf where the mask forbids the pair

Query indices `t` and key indices `s` arrive as tensors that broadcast against each other, [M, 1]
and [1, N] or, in the kernel that walks along queries, [1, M] and [N, 1]: every function here is
elementwise and does not care. As in `nanolm.masks`, a query stands among the keys at
t' = t + (S - T).

Arguments travel in named tuples. A field that is None disappears when the kernel is compiled.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SCAN = tl.constexpr(1024)  # how many document or order numbers one step of a scan reads


class View(NamedTuple):
    """A [B, T, H, K] tensor of any strides."""

    pointer: Any
    stride_b: int
    stride_t: int
    stride_h: int
    stride_k: int


class Shape(NamedTuple):
    """The sizes that are known only at run time."""

    n_queries: int
    n_keys: int
    n_heads: int


class Masks(NamedTuple):
    """nanolm.masks.Mask as pointers to contiguous rows ([B], [B, T], [B, S]); None: no condition.

    Whether it is causal, and whether the order is strict, are compile-time flags of each kernel.
    """

    window: Any
    key_lengths: Any
    documents: Any
    key_documents: Any
    prefix_lengths: Any
    order: Any
    key_order: Any


class Bias(NamedTuple):
    """What is added to the scores; the kind is a compile-time flag.

    alibi     pointer: slopes [H]
    bucket    pointer: the bias by distance, [H, T + S - 1], distance 1 - T first
    dense     pointer: [B, H, T, S] with these strides, 0 where it broadcasts
    """

    pointer: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    stride_s: Any


class Scores(NamedTuple):
    """Constants that turn q . k into log2 units: times `to_log2`, or `cap` * tanh(`to_cap` * …)."""

    to_log2: float
    cap: float
    to_cap: float


class Dropout(NamedTuple):
    """seed: pointer to an int64, or None for no dropout; an entry is kept when 31 random bits are
    not below the threshold, and then multiplied by `scale` = 1 / (1 - p)."""

    seed: Any
    threshold: Any
    scale: Any


@triton.jit
def head_pointer(view, batch, head):
    """Where one head's [T, K] matrix begins."""
    return view.pointer + tl.cast(batch, tl.int64) * view.stride_b + head * view.stride_h


@triton.jit
def tile_pointers(view, base, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers [ROWS, COLUMNS] to rows first, first + 1, …; the long way is taken in 64 bits."""
    base += tl.cast(first, tl.int64) * view.stride_t
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return base + row * view.stride_t + column * view.stride_k


@triton.jit
def load_tile(
    view,
    base,
    first,
    n_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """[ROWS, COLUMNS] of one head, zero outside; rows are compared with n_rows only if CHECKED."""
    pointers = tile_pointers(view, base, first, ROWS, COLUMNS)
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    if CHECKED:
        inside = (row < n_rows) & (column < WIDTH)
        return tl.load(pointers, mask=inside, other=0.0)
    elif WIDTH != COLUMNS:
        return tl.load(pointers, mask=column < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(
    view,
    base,
    tile,
    first,
    n_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the part of [ROWS, COLUMNS] that lies inside the matrix."""
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    pointers = tile_pointers(view, base, first, ROWS, COLUMNS)
    inside = (row < n_rows) & (column < WIDTH)
    tl.store(pointers, tile.to(view.pointer.dtype.element_ty), mask=inside)


@triton.jit
def visible(masks, batch, t, s, shape, CAUSAL: tl.constexpr, STRICT: tl.constexpr):
    """Which pairs of the tile the mask allows: `Mask.dense`, pair by pair."""
    at = t + (shape.n_keys - shape.n_queries)
    allowed = (t < shape.n_queries) & (s < shape.n_keys)
    if CAUSAL:
        behind = s <= at
        if masks.prefix_lengths is not None:
            behind = behind | (s < tl.load(masks.prefix_lengths + batch))
        allowed = allowed & behind
    if masks.window is not None:
        allowed = allowed & (at - s < masks.window) & (s - at < masks.window)
    if masks.key_lengths is not None:
        allowed = allowed & (s < tl.load(masks.key_lengths + batch))
    query_row = tl.cast(batch, tl.int64) * shape.n_queries
    key_row = tl.cast(batch, tl.int64) * shape.n_keys
    if masks.documents is not None:
        mine = tl.load(masks.documents + query_row + t, mask=t < shape.n_queries, other=0)
        theirs = tl.load(masks.key_documents + key_row + s, mask=s < shape.n_keys, other=0)
        allowed = allowed & (mine == theirs)
    if masks.order is not None:
        mine = tl.load(masks.order + query_row + t, mask=t < shape.n_queries, other=0)
        theirs = tl.load(masks.key_order + key_row + s, mask=s < shape.n_keys, other=0)
        allowed = allowed & ((theirs < mine) if STRICT else (theirs <= mine))
    return allowed


@triton.jit
def bias_tile(bias, batch, head, t, s, shape, BIAS: tl.constexpr):
    """What the tile's scores are raised by, in natural units."""
    distance = t + (shape.n_keys - shape.n_queries) - s
    inside = (t < shape.n_queries) & (s < shape.n_keys)
    if BIAS == "alibi":
        return -tl.load(bias.pointer + head) * tl.abs(distance)
    elif BIAS == "bucket":
        n_distances = shape.n_queries + shape.n_keys - 1
        index = head * n_distances + distance + (shape.n_queries - 1)
        return tl.load(bias.pointer + index, mask=inside, other=0.0)
    else:
        head_start = tl.cast(batch, tl.int64) * bias.stride_b + head * bias.stride_h
        offsets = head_start + tl.cast(t, tl.int64) * bias.stride_t + s * bias.stride_s
        return tl.load(bias.pointer + offsets, mask=inside, other=0.0)


@triton.jit
def tanh(x):
    """tanh, which Triton offers only through a library that the interpreter lacks."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def scores_tile(
    dots,
    batch,
    head,
    t,
    s,
    shape,
    masks,
    bias,
    scores,
    CAUSAL: tl.constexpr,
    STRICT: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """(scores in log2 units, slope of the soft-cap) from q . k; the mask is applied if CHECKED."""
    if SOFTCAP:
        bent = tanh(dots * scores.to_cap)
        score = bent * scores.cap
        slope = 1 - bent * bent
    else:
        score = dots * scores.to_log2
        slope = score  # not used
    if BIAS != "none":
        score += bias_tile(bias, batch, head, t, s, shape, BIAS) * LOG2E
    if CHECKED:
        allowed = visible(masks, batch, t, s, shape, CAUSAL, STRICT)
        score = tl.where(allowed, score, float("-inf"))
    return score, slope


@triton.jit
def kept(dropout, batch, head, t, s):
    """bool: the entries that dropout keeps, a function of (seed, batch, head, t, s) alone.

    Philox-4x32-10 (Salmon et al. 2011) with the four indices as its counter.
    """
    zero = t * 0 + s * 0
    bits, _, _, _ = tl.philox(tl.load(dropout.seed), zero + s, zero + t, zero + head, zero + batch)
    return (bits >> 1).to(tl.int32) >= dropout.threshold


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
    full_begin = tl.maximum((full_begin + STEP - 1) // STEP * STEP, begin)
    full_end = full_end // STEP * STEP
    if full_end <= full_begin:
        full_begin = begin
        full_end = begin
    return begin, full_begin, full_end, tl.maximum(end, full_end)


@triton.jit
def key_range(
    masks,
    batch,
    first,
    shape,
    CAUSAL: tl.constexpr,
    STRICT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
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
    masks,
    batch,
    first,
    shape,
    CAUSAL: tl.constexpr,
    STRICT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
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
