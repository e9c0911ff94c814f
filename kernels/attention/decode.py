"""Attention, decoding: one new query (or a few) of each row against a long cache of keys.

With T = 1 a program per query head would leave most of a GPU idle and read every key once per query
head of its group. So the keys are split over programs (Flash-Decoding, Dao et al. 2023), and one
program takes all T x H/G queries of a key/value head as the rows of its tile. Each returns its
part's softmax with the log of its sum; the parts are put together by those:

    lse = log sum_p exp(lse_p)          out = sum_p exp(lse_p - lse) out_p

Forward only: there is nothing to train while decoding.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width; R rows of a
tile (T x H/G of them are used), P parts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nanolm.kernels.attention.call import SCHEMA, Call, empty_outputs, flatten, product_flops
from nanolm.kernels.attention.ranges import key_range
from nanolm.kernels.attention.scores import LN2, scores_tile
from nanolm.kernels.launch import processors, wide_dtype
from nanolm.kernels.operators import register_autocast
from nanolm.kernels.tiles import head_pointer, load_tile
from nanolm.ops.bias import AlibiBias, Bias
from nanolm.ops.masks import Mask

N_KEYS = 64  # keys of a tile


@triton.jit
def attention_decode_kernel(
    q, k, v, part_out, part_lse, shape, masks, bias, scores, part_keys,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: the queries of one group against one part of its keys."""
    n_parts = tl.maximum(tl.cdiv(shape.n_keys, part_keys), 1)
    part = tl.program_id(0) % n_parts
    n_groups = shape.n_heads // GROUP
    batch = tl.program_id(0) // n_parts // n_groups
    group = tl.program_id(0) // n_parts % n_groups
    row = tl.arange(0, R)[:, None]
    t = row // GROUP
    head = group * GROUP + row % GROUP
    column = tl.arange(0, COLUMNS)[None, :]
    used = (t < shape.n_queries) & (column < WIDTH)
    at = q.pointer + tl.cast(batch, tl.int64) * q.stride_b
    at += tl.cast(t, tl.int64) * q.stride_t + tl.cast(head, tl.int64) * q.stride_h
    at += column * q.stride_k  # `view` copies what is too far apart within a head
    q_tile = tl.load(at, mask=used, other=0.0)
    k_head, v_head = head_pointer(k, batch, group), head_pointer(v, batch, group)
    acc = tl.zeros([R, COLUMNS], ACCUMULATE)
    m = tl.full([R], float("-inf"), ACCUMULATE)
    l = tl.zeros([R], ACCUMULATE)

    begin, _full_begin, _full_end, end = key_range(masks, batch, 0, shape, CAUSAL, R, N)
    first = tl.maximum(begin, part * part_keys)
    # One loop, masked throughout: with a handful of queries the kernel waits for keys from memory,
    # and comparisons are hidden behind that.
    for start in range(first, tl.minimum(end, (part + 1) * part_keys), N):
        s = start + tl.arange(0, N)[None, :]
        k_tile = load_tile(k, k_head, start, shape.n_keys, WIDTH, N, COLUMNS, True)
        v_tile = load_tile(v, v_head, start, shape.n_keys, WIDTH, N, COLUMNS, True)
        dots = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        score, _slope = scores_tile(
            dots, batch, head, t, s, shape, masks, bias, scores, CAUSAL, STRICT, BIAS, SOFTCAP, True
        )
        m_new = tl.maximum(m, tl.max(score, axis=1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(score - shift[:, None])
        shrink = tl.exp2(m - shift)
        l = l * shrink + tl.sum(weight, axis=1)
        update = tl.dot(weight.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        acc = acc * shrink[:, None] + update
        m = m_new

    divisor = tl.where(l > 0, l, 1.0)[:, None]
    lse = tl.where(l[:, None] > 0, (m[:, None] + tl.log2(divisor)) * LN2, float("-inf"))
    n_rows = tl.num_programs(0) // (n_parts * n_groups)
    own = (part * n_rows + batch) * shape.n_queries + t  # of [P, B, T, H]
    own = tl.cast(own, tl.int64) * shape.n_heads + head
    tl.store(part_out + own * WIDTH + column, acc / divisor, mask=used)
    tl.store(part_lse + own, lse, mask=t < shape.n_queries)


@torch.library.custom_op(
    "nanolm::attention_decode", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)"
)
def attention_decode_op(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, K], lse [B, H, T]); arguments as in attention_call, without dropout."""
    call = Call(q, k, v, *rest)
    pairs = call.n_rows * call.n_groups
    tiles = triton.cdiv(call.n_keys, N_KEYS)
    # Enough parts that every multiprocessor has two programs; more would only add results to put
    # together.
    n_parts = max(1, min(tiles, 2 * processors(q.device) // max(pairs, 1)))
    part_keys = max(1, triton.cdiv(tiles, n_parts)) * N_KEYS
    n_parts = max(1, triton.cdiv(call.n_keys, part_keys))  # without a key one part says so
    wide = wide_dtype(q.dtype)
    shape = (n_parts, call.n_rows, call.n_queries, call.n_heads)
    part_out = q.new_empty((*shape, call.width), dtype=wide)
    part_lse = q.new_empty(shape, dtype=wide)
    rows = call.n_queries * call.constants["GROUP"]
    call.start(
        attention_decode_kernel, n_parts * pairs,
        *call.inputs, part_out, part_lse, *call.problem[:-1], part_keys,
        R=max(16, triton.next_power_of_2(rows)), N=N_KEYS, num_warps=4, num_stages=2,
    )  # fmt: skip
    # exp(lse_p - lse) is part p's share of the softmax's sum, so no maximum has to be passed
    # between programs.
    lse = torch.logsumexp(part_lse, dim=0)
    share = torch.exp(part_lse - torch.where(lse == -torch.inf, 0.0, lse))
    out = (share[..., None] * part_out).sum(0).to(q.dtype)
    return out, lse.transpose(1, 2).contiguous()


attention_decode_op.register_fake(empty_outputs)
register_autocast("nanolm::attention_decode", 3)


@register_flop_formula(torch.ops.nanolm.attention_decode)
def decode_flops(q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
    """Two products a head."""
    return product_flops(q_shape, k_shape)


def attention_decode(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    mask: Mask,
    *,
    bias: Bias | None = None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, K], lse [B, H, T]) for few queries and many keys; no gradient."""
    if isinstance(bias, AlibiBias):  # constants here, whether or not they learn elsewhere
        bias = AlibiBias(bias.slopes_H.detach())
    flat = flatten(q_BTHK, k_BSGK, v_BSGK, mask, bias, scale=scale, softcap=softcap)
    return attention_decode_op(*(x.detach() if isinstance(x, Tensor) else x for x in flat))
