"""Attention biases as intent: what is added to the scores, as a function of the distance.

A position encoding builds one of these once per stack. A kernel that understands the intent adds it
block by block; the reference materialises it. The distance of query t to key s is
(t + S - T) - s, so it also holds when T queries extend a cache.

Shapes: H heads, T queries, S keys.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

HIDDEN = torch.finfo(torch.bfloat16).min
"""What others write into a bias for "may not be seen" is the lowest number of its dtype: -3.39e38
in bfloat16, -3.40e38 in float32."""


def distances(n_queries: int, n_keys: int, device: torch.device | str) -> Tensor:
    """int64 [T, S]: how far the key stands before the query; negative when it stands after."""
    t = torch.arange(n_queries, device=device) + (n_keys - n_queries)
    return t[:, None] - torch.arange(n_keys, device=device)[None, :]


@dataclasses.dataclass(frozen=True)
class AlibiBias:
    """-slope_h * |distance| (Press et al. 2022, section 3).

    Slopes that learn are a kind of their own for kernels to refuse: `bias="learned_alibi"` in the
    spec, `bias_kind` of a position encoding.
    """

    slopes_H: Tensor
    kind = "alibi"

    def dense(self, n_queries: int, n_keys: int) -> Tensor:
        """[H, T, S]: the bias, materialised."""
        distance_TS = distances(n_queries, n_keys, self.slopes_H.device).abs()
        # 16 bits hold whole distances up to 256 (bfloat16) or 2048 (float16) only.
        wide = torch.promote_types(self.slopes_H.dtype, torch.float32)
        return -self.slopes_H.to(wide)[:, None, None] * distance_TS


@dataclasses.dataclass(frozen=True)
class BucketBias:
    """A learned scalar per head and distance bucket (Raffel et al. 2020, section 2.1)."""

    table_NH: Tensor  # [buckets, heads], learned
    bidirectional: bool
    max_distance: int
    kind = "bucket"

    def buckets(self, distance: Tensor) -> Tensor:
        """Bucket numbers for int64 distances: exact when near, logarithmic up to max_distance."""
        n_buckets = self.table_NH.shape[0]
        offset = torch.zeros_like(distance)
        if self.bidirectional:  # half the buckets for keys after the query, half for those before
            n_buckets //= 2
            offset = (distance < 0).long() * n_buckets
            distance = distance.abs()
        else:
            distance = distance.clamp(min=0)
        n_exact = n_buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / n_exact)
        far = (
            n_exact + (ratio / math.log(self.max_distance / n_exact) * (n_buckets - n_exact)).long()
        )
        return offset + torch.where(distance < n_exact, distance, far.clamp(max=n_buckets - 1))

    def dense(self, n_queries: int, n_keys: int) -> Tensor:
        """[H, T, S]: the bias, materialised; differentiable in the table."""
        bucket_TS = self.buckets(distances(n_queries, n_keys, self.table_NH.device))
        return self.table_NH[bucket_TS].permute(2, 0, 1)


@dataclasses.dataclass(frozen=True)
class DenseBias:
    """Any additive bias that broadcasts to [B, H, T, S].

    A value of HIDDEN or less, -inf among them, hides the pair as the mask does: a query that is
    left with no key gives 0, in every kernel. As a number it would swallow the scores that it is
    added to, and whether anything of them is left would be a matter of dtypes.
    """

    values: Tensor
    kind = "dense"

    def dense(self, n_queries: int, n_keys: int) -> Tensor:
        """The values, -inf where they hide."""
        return self.values.masked_fill(self.values <= HIDDEN, -math.inf)


Bias = AlibiBias | BucketBias | DenseBias
