"""Attention on a CPU over many short sequences in one row, without a mask and without padding.

    row  = [ a a | b b | c c c | d d d d | e e e e ]      sequences by length (Mask.length_groups)
    run 2 x [2, 2], 1 x [3, 3], 2 x [4, 4]                instead of one masked [15, 15]

Sequences of equal length are a plain batch: attention runs once for each length, so the products
spent are sum_s T_s^2 and no more. The row holds nothing but tokens, so the linear layers compute
for real tokens only. A layer's causality, window and bias mean the same in every sequence, because
they depend on distances within it. Batches that do not say where their sequences lie go through
the mask, as ever.

Shapes: B rows, T queries, S keys, H query heads, G key/value heads, K head width, N sequences of a
class, L their length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanolm.ops.contract import AttentionSpec, kernel
from nanolm.ops.cpu_bf16 import BF16, WideAttention, autocasts, multiplies_bf16, rounded
from nanolm.ops.masks import Mask
from nanolm.ops.pytorch import SdpaAttention


@kernel("attention")
class ByLengthAttention:
    """Attention, one length after the other."""

    name = "by_length"
    takes_length_groups = True
    """Rows are laid out for it: see `Task.arrange_for`."""

    def __init__(self) -> None:
        self.sdpa, self.wide = SdpaAttention(), WideAttention()

    def why_not(self, spec: AttentionSpec) -> str | None:
        if spec.device != "cpu":
            return "it is for a CPU; a GPU's kernels skip what documents hide"
        if "length_groups" not in spec.masks:
            return "batches do not tell where sequences of equal length lie"
        if spec.bias == "dense":
            return "a dense bias belongs to places in the row, not to distances"
        return self.sdpa.why_not(spec)

    def run(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask, **rest: Any
    ) -> Tensor:
        """As sdpa, [B, T, H, K], in bfloat16 as wide."""
        rounds = not multiplies_bf16()
        if mask.length_groups is None:
            masked = self.wide if rounds else self.sdpa
            return masked.run(q_BTHK, k_BSGK, v_BSGK, mask, **rest)
        if not (rounds and autocasts()):
            return self.by_length(q_BTHK, k_BSGK, v_BSGK, mask, **rest)
        with torch.autocast("cpu", enabled=False):
            q, k, v = (rounded(x) for x in (q_BTHK, k_BSGK, v_BSGK))
            return self.by_length(q, k, v, mask, **rest).to(BF16)

    def by_length(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask, **rest: Any
    ) -> Tensor:
        """Attention on [N, L, H, K] for each length."""
        length_groups = mask.length_groups or ()  # `run` has seen that there are some
        sizes = [number * length for number, length in length_groups]
        within = Mask(causal=mask.causal, window=mask.window)
        # One split and one cat: the gradient of many slices would be many full-sized tensors.
        parts = zip(
            length_groups, *(x.flatten(0, 1).split(sizes) for x in (q_BTHK, k_BSGK, v_BSGK))
        )
        found = []
        for (number, length), *part in parts:
            q, k, v = (x.unflatten(0, (number, length)) for x in part)
            found.append(self.sdpa.run(q, k, v, within, **rest).flatten(0, 1))
        return torch.cat(found).view(q_BTHK.shape)
