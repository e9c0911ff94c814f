"""FlexAttention as a kernel of attention: the mask and the bias as functions that it compiles.

torch.nn.attention.flex_attention takes two functions of (batch, head, query, key): which pairs are
allowed, and what becomes of a score. Both follow from a Mask and a Bias, so every kind of mask can
be served. It is chosen only by name (`kernels.attention: flex`), for comparison: a block mask is
built anew in every call, and a learned bias's gradient is added atomically, in another order each
time.

On CUDA both the block mask and attention are compiled, as a whole or not at all. On a CPU torch
2.13 has no backward pass for it, and without torch.compile holds all scores, as the reference does.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width, J distances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanolm.ops.bias import AlibiBias, Bias, BucketBias
from nanolm.ops.chunked_cross_entropy import product_dtype
from nanolm.ops.contract import AttentionSpec, kernel
from nanolm.ops.masks import Mask
from nanolm.ops.reference import AttentionOutput

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@kernel("attention")
class FlexAttention:
    """torch's FlexAttention (Dong et al. 2024), compiled on CUDA; inference only on a CPU."""

    name = "flex"

    def why_not(self, spec: AttentionSpec) -> str | None:
        """What FlexAttention of torch 2.13 cannot do, first what it never can."""
        if spec.device not in ("cpu", "cuda"):
            return f"FlexAttention runs on cuda and cpu, not on {spec.device}"
        if spec.dtype not in DTYPES:
            return f"FlexAttention has no {spec.dtype} version"
        if spec.dropout > 0:
            return "FlexAttention has no dropout"
        if spec.phase == "train" and spec.device == "cpu":
            return "FlexAttention has no backward pass on a CPU"
        if spec.phase == "train" and spec.bias in ("learned_alibi", "bucket", "dense"):
            return "FlexAttention adds a learned bias's gradient atomically: runs would differ"
        if spec.device == "cuda" and spec.head_dim < 16:
            return f"FlexAttention's heads are at least 16 wide on CUDA, not {spec.head_dim}"
        return None

    def run(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        mask: Mask,
        *,
        bias: Bias | None = None,
        scale: float,
        softcap: float | None = None,
        dropout: float = 0.0,
        return_lse: bool = False,
    ) -> Tensor | AttentionOutput:
        """As the reference; raises ValueError when asked for dropout."""
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: PLC0415  (imports dynamo)

        if dropout > 0:
            raise ValueError("flex has no dropout")
        dtype = product_dtype(q_BTHK)
        q_BHTK, k_BGSK, v_BGSK = (x.to(dtype).transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
        sizes = q_BHTK.shape[0], q_BHTK.shape[2], k_BGSK.shape[2]
        block_mask_of, attend = functions(q_BTHK.is_cuda)
        block_mask = None
        if mask.kinds():
            rows = sizes[0] if mask.kinds() - {"causal", "window"} else None
            block_mask = block_mask_of(
                pairs_allowed(mask, *sizes), rows, None, *sizes[1:], device=q_BTHK.device
            )
        with torch.autocast(q_BTHK.device.type, enabled=False):
            out_BHTK, auxiliary = attend(
                q_BHTK,
                k_BGSK,
                v_BGSK,
                score_mod=changed_score(bias, softcap, *sizes[1:]),
                block_mask=block_mask,
                scale=scale,
                enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
                return_aux=AuxRequest(lse=True) if return_lse else AuxRequest(),
            )
        out_BTHK = out_BHTK.transpose(1, 2)
        return AttentionOutput(out_BTHK, auxiliary.lse) if return_lse else out_BTHK


@functools.cache
def functions(compiled: bool) -> tuple[Callable, Callable]:
    """(create_block_mask, flex_attention), each compiled into one graph if asked for."""
    from torch.nn.attention import flex_attention  # noqa: PLC0415  (imports dynamo)

    both = (flex_attention.create_block_mask, flex_attention.flex_attention)
    if not compiled:
        return both
    create, attend = (torch.compile(f, fullgraph=True) for f in both)
    return create, attend


def pairs_allowed(
    mask: Mask, n_rows: int, n_queries: int, n_keys: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`Mask.dense`, pair by pair, as a function of (batch, head, query, key)."""

    def rows(x: Tensor | None, length: int) -> Any:
        return None if x is None else x.expand(n_rows, length)

    key_documents = mask.documents if mask.key_documents is None else mask.key_documents
    key_order = mask.order if mask.key_order is None else mask.key_order
    documents, theirs = rows(mask.documents, n_queries), rows(key_documents, n_keys)
    order, their_order = rows(mask.order, n_queries), rows(key_order, n_keys)
    lengths, prefixes = (
        None if x is None else x.expand(n_rows) for x in (mask.key_lengths, mask.prefix_lengths)
    )
    shift = n_keys - n_queries

    def allowed(b: Tensor, _: Tensor, t: Tensor, s: Tensor) -> Tensor:
        at = t + shift
        visible = s >= 0
        if mask.causal:
            behind = s <= at
            visible = behind if prefixes is None else behind | (s < prefixes[b])
        if mask.window is not None:
            visible = visible & ((at - s).abs() < mask.window)
        if lengths is not None:
            visible = visible & (s < lengths[b])
        if documents is not None:
            visible = visible & (documents[b, t] == theirs[b, s])
        if order is not None:
            before = torch.lt if mask.strict else torch.le
            visible = visible & before(their_order[b, s], order[b, t])
        return visible

    return allowed


def changed_score(
    bias: Bias | None, softcap: float | None, n_queries: int, n_keys: int
) -> Callable[..., Tensor] | None:
    """softcap(score) + bias as a function of (score, batch, head, query, key); None if neither."""
    if bias is None and softcap is None:
        return None
    added = None if bias is None else bias_of_pair(bias, n_queries, n_keys)

    def change(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if added is None else score + added(b, h, t, s)

    return change


def bias_of_pair(bias: Bias, n_queries: int, n_keys: int) -> Callable[..., Any]:
    """The bias as a function of (batch, head, query, key)."""
    shift = n_keys - n_queries
    if isinstance(bias, AlibiBias):
        slopes_H = bias.slopes_H.to(torch.promote_types(bias.slopes_H.dtype, torch.float32))
        return lambda b, h, t, s: -slopes_H[h] * (t + shift - s).abs()
    if isinstance(bias, BucketBias):
        distance_J = torch.arange(1 - n_queries, n_keys, device=bias.table_NH.device)
        values_JH = bias.table_NH[bias.buckets(distance_J)]
        return lambda b, h, t, s: values_JH[t + shift - s + n_queries - 1, h]
    values = bias.dense(n_queries, n_keys)
    values = values.reshape([1] * (4 - values.ndim) + list(values.shape))
    values = values.expand(-1, -1, n_queries, n_keys)  # a bias of keys alone has one row of queries
    has_rows, has_heads = values.shape[0] > 1, values.shape[1] > 1
    return lambda b, h, t, s: values[b if has_rows else 0, h if has_heads else 0, t, s]
