"""What masks, biases and shapes may bring besides: right by their definition, and forgotten by
those who have seen one data set or one model only.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolm.tools.kernel_check.attention_cases import ALONE, BF16, FP16, FP32, Case

BEYOND = 1 << 24
"""The first number whose successor float32 does not hold."""


def apart(x: Tensor) -> Tensor:
    """The same numbers as a column or two of a wider tensor, as a batch without its last token has
    them: rows with other numbers between them."""
    wide = torch.stack([x, (x + 1).flip(-1)], dim=-1)
    return wide[..., 0]


Numbers = Callable[[int, int], tuple[str, Tensor]]
"""A field of a mask and its numbers [B, S], from B and S."""


def documents(values: list[int]) -> Numbers:
    """Documents of these numbers, each in one piece."""

    def drawn(n_rows: int, n_keys: int) -> tuple[str, Tensor]:
        index = np.random.default_rng(11).integers(0, len(values), (n_rows, n_keys))
        return "documents", torch.tensor(values)[torch.tensor(np.sort(index, axis=1))]

    return drawn


def returning(n_rows: int, n_keys: int) -> tuple[str, Tensor]:
    """Documents in several pieces."""
    return "documents", torch.tensor(np.random.default_rng(12).integers(0, 3, (n_rows, n_keys)))


def places(n_places: int, first: int) -> Numbers:
    """An order of so many places from the first one on."""

    def drawn(n_rows: int, n_keys: int) -> tuple[str, Tensor]:
        index = np.random.default_rng(13).integers(0, n_places, (n_rows, n_keys))
        return "order", first + torch.tensor(index)

    return drawn


UNUSUAL: dict[str, Numbers] = {
    "documents that come back": returning,
    "documents below 0": documents([-2, -1, 0, 1]),
    # The first two are the same in 16 bits, the last two in float32.
    "large documents": documents([1, 1 + (1 << 16), BEYOND, BEYOND + 1]),
    "places shared": places(6, 0),
    "large places": places(29, BEYOND),
}

CACHE: dict[str, Any] = {"n_rows": 4, "n_keys": 67, "lengths": True}
CORNERS = {
    "documents that come back": Case(documents=True, numbers="documents that come back"),
    "documents below 0": Case(documents=True, numbers="documents below 0"),
    "large documents": Case(documents=True, numbers="large documents"),
    "places shared": Case(order="loose", numbers="places shared"),
    "large places": Case(order="loose", numbers="large places"),
    "documents of queries and of keys": Case(n_queries=19, n_keys=40, documents=True),
    "order of queries and of keys": Case(n_queries=19, n_keys=40, order="loose"),
    "masks with gaps": Case(
        causal=True, lengths=True, documents=True, prefix=True, order="loose", numbers="gaps"
    ),
    "prefix under a window": Case(causal=True, prefix=True, window=7),
    "prefix without causality": Case(prefix=True),
    "causal over a padded cache": Case(n_rows=4, n_queries=11, causal=True, lengths=True),
    "one query, padded cache": Case(
        **CACHE, n_queries=1, causal=True, n_heads=4, n_kv_heads=2
    ),
    "one query, padded cache, window": Case(
        **CACHE, n_queries=1, causal=True, window=40, bias="alibi"
    ),
    "three queries, padded cache": Case(
        **CACHE, n_queries=3, causal=True, bias="bucket", softcap=3.0
    ),
    "grouped heads and slopes": Case(n_heads=4, n_kv_heads=2, bias="alibi", causal=True),
    "grouped heads and a bias by head": Case(n_heads=4, n_kv_heads=2, bias="dense_by_head"),
    "bias by row": Case(bias="dense_by_row"),
    "bias of keys": Case(bias="dense_of_keys"),
    "bias of T and S": Case(bias="dense_of_places"),
    "bias expanded to rows": Case(bias="dense_expanded"),
    "no rows": Case(n_rows=0, causal=True),
    "float64": Case(dtype=torch.float64, causal=True, bias="alibi", size=4.0),
    "head of 17": Case(width=17, n_rows=1, causal=True),
    "q, k and v of unlike strides": Case(layout="unlike"),
    # The largest scores are hidden: what is subtracted before exp must be the largest that is left.
    "large scores, hidden": Case(**ALONE, size=12.0, causal=True),
    # q . k is beyond 65,504 before it is scaled, and within behind it.
    "large scores in float16": Case(**ALONE, size=100.0, dtype=FP16),
    # All keys are far: a bias rounded to 16 bits no longer tells one from the next.
    "slopes and far keys in bfloat16": Case(
        n_rows=3, n_heads=1, n_kv_heads=1, n_queries=3, n_keys=600, lengths=True,
        dtype=BF16, bias="alibi", bias_dtype=FP32,
    ),
}  # fmt: skip
"""By name; each kind of fault has a case that tells it from others."""
