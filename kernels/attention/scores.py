"""What all attention kernels share: one tile of scores, and who may see whom in it.

A tile is M queries by N keys. Its scores are kept in units of log2, because the GPU has exp2:

    score = log2(e) * (softcap(q . k * scale) + bias),   -inf where the mask forbids the pair

Query indices `t` and key indices `s` arrive as tensors that broadcast against each other, [M, 1]
and [1, N] or, in the kernel that walks along queries, [1, M] and [N, 1]: every function here is
elementwise and does not care. As in `nanolm.ops.masks`, a query stands among the keys at
t' = t + (S - T). Which tiles are visited at all is decided in ranges.py.

Arguments travel in named tuples. A field that is None disappears when the kernel is compiled.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nanolm.kernels.tiles import tanh
from nanolm.ops import bias as bias_module

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(bias_module.HIDDEN)


class Shape(NamedTuple):
    """The sizes that are known only at run time."""

    n_queries: int
    n_keys: int
    n_heads: int


class Masks(NamedTuple):
    """A `Mask` as pointers to contiguous rows ([B], [B, T], [B, S]); None: no condition.

    Whether it is causal, and whether the order is strict, are compile-time flags of each kernel.
    Ranges ([B, 2, T] of keys, [B, 2, S] of queries) bound the loops and forbid no pair: without
    them every tile is visited.
    """

    window: Any
    key_lengths: Any
    documents: Any
    key_documents: Any
    prefix_lengths: Any
    order: Any
    key_order: Any
    key_ranges: Any
    query_ranges: Any


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
    """seed: pointer to an int64, or None for no dropout; an entry is kept when 16 random bits are
    not below the threshold, and then multiplied by `scale` = 1 / (1 - p)."""

    seed: Any
    threshold: Any
    scale: Any


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
        # Two comparisons a pair, only in tiles on the window's edges: those outside are not
        # visited.
        allowed = allowed & (at - s < masks.window) & (s - at < masks.window)
    if masks.key_lengths is not None:
        allowed = allowed & (s < tl.load(masks.key_lengths + batch))
    query_row = tl.cast(batch, tl.int64) * shape.n_queries
    key_row = tl.cast(batch, tl.int64) * shape.n_keys
    if masks.documents is not None:
        # The dearest conditions: numbers of queries and of keys are read in every tile, [M] + [N]
        # of them, since where documents end is not arithmetic.
        mine = tl.load(masks.documents + query_row + t, mask=t < shape.n_queries, other=0)
        theirs = tl.load(masks.key_documents + key_row + s, mask=s < shape.n_keys, other=0)
        allowed = allowed & (mine == theirs)
    if masks.order is not None:
        mine = tl.load(masks.order + query_row + t, mask=t < shape.n_queries, other=0)
        theirs = tl.load(masks.key_order + key_row + s, mask=s < shape.n_keys, other=0)
        allowed = allowed & ((theirs < mine) if STRICT else (theirs <= mine))
    return allowed


@triton.jit
def bias_tile(bias, batch, head, t, s, shape, BIAS: tl.constexpr, ACCUMULATE: tl.constexpr):
    """What the tile's scores are raised by, in natural units and the dtype of the scores."""
    distance = t + (shape.n_keys - shape.n_queries) - s
    inside = (t < shape.n_queries) & (s < shape.n_keys)
    if BIAS == "alibi":
        return -tl.load(bias.pointer + head).to(ACCUMULATE) * tl.abs(distance)
    elif BIAS == "bucket":
        n_distances = shape.n_queries + shape.n_keys - 1
        index = tl.cast(head, tl.int64) * n_distances + distance + (shape.n_queries - 1)
        return tl.load(bias.pointer + index, mask=inside, other=0.0).to(ACCUMULATE)
    else:
        head_start = tl.cast(batch, tl.int64) * bias.stride_b
        head_start += tl.cast(head, tl.int64) * bias.stride_h
        offsets = tl.cast(t, tl.int64) * bias.stride_t + tl.cast(s, tl.int64) * bias.stride_s
        value = tl.load(bias.pointer + head_start + offsets, mask=inside, other=0.0)
        value = value.to(ACCUMULATE)
        return tl.where(value <= HIDDEN, float("-inf"), value)


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
        # A 16-bit bias is raised to the scores' dtype before anything is multiplied.
        score += bias_tile(bias, batch, head, t, s, shape, BIAS, score.dtype) * LOG2E
    if CHECKED:
        allowed = visible(masks, batch, t, s, shape, CAUSAL, STRICT)
        score = tl.where(allowed, score, float("-inf"))
    return score, slope


@triton.jit
def kept(dropout, batch, head, t, s):
    """bool: the entries that dropout keeps, a function of (seed, batch, head, t, s) alone.

    Philox-4x32-10 (Salmon et al. 2011). Its four words are eight decisions of 16 bits: bit 3 of t
    and bit 3 of s choose a word and bit 0 of s a half of it; the other bits of t and s are the
    counter, with head and batch.
    """
    # These bits, because a thread of a tensor core's result holds rows 8 apart and neighbouring
    # columns: it asks for the same words several times, and the compiler computes them once.
    # Written with quotients, which it can tell to be equal; with masks of bits it often cannot.
    zero = t * 0 + s * 0
    s_counter = zero + (s // 16 * 4 + s % 8 // 2)
    t_counter = zero + (t // 16 * 8 + t % 8)
    a, b, c, d = tl.philox(tl.load(dropout.seed), s_counter, t_counter, zero + head, zero + batch)
    word = tl.where((t & 8) == 0, tl.where((s & 8) == 0, a, b), tl.where((s & 8) == 0, c, d))
    half = tl.where((s & 1) == 0, word & 0xFFFF, word >> 16)
    return half.to(tl.int32) >= dropout.threshold
