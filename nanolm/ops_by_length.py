"""Attention on a CPU over many short sequences in one row, without a mask and without padding.

    row  = [ a a | b b | c c c | d d d d | e e e e ]      sequences by length (Mask.classes)
    run 2 x [2, 2], 1 x [3, 3], 2 x [4, 4]                instead of one masked [15, 15]

Sequences of equal length are a plain batch: attention runs once for each length, so the products
spent are sum_s T_s^2 and no more. The row holds nothing but tokens, so the linear layers compute
for real tokens only. A layer's causality, window and bias mean the same in every sequence, because
they depend on distances within it. Batches that do not say where their sequences lie go through
the mask, as ever.

Shapes: B rows, T queries, S keys, H query heads, G key/value heads, K head width, M tokens of the
row, N sequences of a class, L their length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanolm.masks import Classes, Mask
from nanolm.ops import AttentionSpec, kernel
from nanolm.ops_torch import SdpaAttention
from nanolm.ops_wide import BF16, WideAttention, autocasts, multiplies_bf16, rounded

_ATEN = torch.ops.aten


class PlainByLength(torch.autograd.Function):
    """All lengths as one node: many short calls would spend more on the graph than on products.

    q, k, v and the result are [M, H, K]; calls what sdpa calls on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, classes: Classes, causal: bool, scale: float
    ) -> Tensor:
        out_MHK, lses = torch.empty_like(q), []
        for part in parts_of(classes, q, k, v, out_MHK):
            *inputs, result = part
            found, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
                *inputs, 0.0, causal, scale=scale
            )
            result.copy_(found)
            lses.append(lse)
        ctx.save_for_backward(q, k, v, out_MHK, *lses)
        ctx.classes, ctx.causal, ctx.scale = classes, causal, scale
        return out_MHK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MHK: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out_MHK, *lses = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        parts = parts_of(ctx.classes, grad_MHK.contiguous(), q, k, v, out_MHK, *grads)
        for (*inputs, dq, dk, dv), lse in zip(parts, lses, strict=True):
            found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                *inputs, lse, 0.0, ctx.causal, scale=ctx.scale
            )
            for target, values in zip((dq, dk, dv), found, strict=True):
                target.copy_(values)
        return *grads, None, None, None


def parts_of(classes: Classes, *xs_MHK: Tensor) -> Iterator[list[Tensor]]:
    """For each class, every tensor's part as a view [N, H, L, K]."""
    start = 0
    for number, length in classes:
        stop = start + number * length
        yield [x[start:stop].unflatten(0, (number, length)).transpose(1, 2) for x in xs_MHK]
        start = stop


@kernel("attention")
class ByLengthAttention:
    """Attention, one length after the other."""

    name = "by_length"
    takes_classes = True
    """Rows are laid out for it: see `Task.arrange_for`."""

    def __init__(self) -> None:
        self.sdpa, self.wide = SdpaAttention(), WideAttention()

    def why_not(self, spec: AttentionSpec) -> str | None:
        if spec.device != "cpu":
            return "it is for a CPU; a GPU's kernels skip what documents hide"
        if "classes" not in spec.masks:
            return "batches do not tell where sequences of equal length lie"
        if spec.bias == "dense":
            return "a dense bias belongs to places in the row, not to distances"
        return self.sdpa.why_not(spec)

    def run(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask, **rest: Any
    ) -> Tensor:
        """As sdpa, [B, T, H, K], in bfloat16 as wide."""
        rounds = not multiplies_bf16()
        if mask.classes is None:
            masked = self.wide if rounds else self.sdpa
            return masked.run(q_BTHK, k_BSGK, v_BSGK, mask, **rest)
        if not (rounds and autocasts()):
            return self.by_length(q_BTHK, k_BSGK, v_BSGK, mask, **rest)
        with torch.autocast("cpu", enabled=False):
            inputs = (rounded(x) for x in (q_BTHK, k_BSGK, v_BSGK))
            return self.by_length(*inputs, mask, **rest).to(BF16)

    def fuses(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        mask: Mask,
        *,
        scale: float,
        bias: Any = None,
        softcap: float | None = None,
        dropout: float = 0.0,
    ) -> bool:
        """Whether all lengths can be one node of the gradient's graph."""
        plain = bias is None and mask.window is None and dropout == 0
        return plain and q_BTHK.shape == k_BSGK.shape and q_BTHK.device.type == "cpu"

    def by_length(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask, **rest: Any
    ) -> Tensor:
        """Attention on [N, L, H, K] for each length."""
        if self.fuses(q_BTHK, k_BSGK, mask, **rest):
            inputs = (x.flatten(0, 1) for x in (q_BTHK, k_BSGK, v_BSGK))
            out_MHK = PlainByLength.apply(*inputs, mask.classes, mask.causal, rest["scale"])
            return out_MHK.view(q_BTHK.shape)
        sizes = [number * length for number, length in mask.classes]
        within = Mask(causal=mask.causal, window=mask.window)
        # One split and one cat: the gradient of many slices would be many full-sized tensors.
        parts = zip(mask.classes, *(x.flatten(0, 1).split(sizes) for x in (q_BTHK, k_BSGK, v_BSGK)))
        found = []
        for (number, length), *part in parts:
            q, k, v = (x.unflatten(0, (number, length)) for x in part)
            found.append(self.sdpa.run(q, k, v, within, **rest).flatten(0, 1))
        return torch.cat(found).view(q_BTHK.shape)
