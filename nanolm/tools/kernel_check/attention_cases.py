"""Attention problems by their features: each alone, hard combinations by name, mixed dtypes, and
larger sizes.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from nanolm.ops.contract import Phase

BiasKind = Literal[
    "none",
    "alibi",
    "learned_alibi",
    "bucket",
    "dense",
    "dense_by_head",
    "dense_by_row",
    "dense_all",
    "dense_hiding",
    "dense_of_keys",
    "dense_of_places",
    "dense_expanded",
]
Numbers = Literal[
    "usual",
    "documents that come back",
    "documents below 0",
    "large documents",
    "places shared",
    "large places",
    "gaps",
]
"""What the integers of masks are: those besides the usual ones stand in attention_corners.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention problem, by its features."""

    n_rows: int = 2
    n_queries: int = 29
    n_keys: int = 29
    n_heads: int = 2
    n_kv_heads: int = 2
    width: int = 16
    causal: bool = False
    window: int | None = None
    lengths: bool = False
    documents: bool = False
    prefix: bool = False
    order: Literal["none", "loose", "strict"] = "none"
    bias: BiasKind = "none"
    softcap: float | None = None
    layout: Literal["contiguous", "heads_first", "sliced", "unlike"] = "contiguous"
    dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype | None = None
    """The bias parameters' dtype, where it is not that of queries, keys and values."""
    autocast: torch.dtype | None = None
    integers: torch.dtype = torch.int64
    """The dtype of the mask's numbers."""
    numbers: Numbers = "usual"
    sharpness: float = 1.1
    """What the usual scale is multiplied by: not quite 1."""
    size: float = 1.0
    """What queries and keys are multiplied by, in place."""
    phase: Phase = "train"

    @property
    def scale(self) -> float:
        """What the products are multiplied by: not quite the usual 1 / sqrt(K)."""
        return self.sharpness * self.width**-0.5

    def features(self) -> str:
        """What differs from the plain case, in words."""
        plain = Case()
        different = [
            f"{field.name}={getattr(self, field.name)}".removesuffix("=True")
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        ]
        return " ".join(different).replace("torch.", "") or "plain"


SINGLE = {
    "plain": Case(),
    "causal": Case(causal=True),
    "window": Case(window=5),
    "window of one": Case(window=1),
    "lengths": Case(lengths=True),
    "documents": Case(documents=True),
    "prefix": Case(causal=True, prefix=True),
    "order": Case(order="loose"),
    "strict order": Case(order="strict"),
    "alibi": Case(bias="alibi"),
    "bucket bias": Case(bias="bucket"),
    "dense bias": Case(bias="dense"),
    "soft-cap": Case(softcap=3.0),
    "grouped heads": Case(n_heads=4, n_kv_heads=2, n_rows=1),
    "fewer queries than keys": Case(n_queries=11, causal=True),
    "more queries than keys": Case(n_keys=11, causal=True),
    "learned slopes": Case(bias="learned_alibi"),
    "bias that hides": Case(bias="dense_hiding"),
    "float16": Case(dtype=torch.float16),
    "bfloat16": Case(dtype=torch.bfloat16),
    "strides": Case(layout="sliced"),
    "int32 masks": Case(
        causal=True, lengths=True, documents=True, prefix=True, order="loose", integers=torch.int32
    ),
}

HARD = {
    "T5 decoder over a cache": Case(n_queries=11, n_keys=31, causal=True, bias="bucket"),
    "ModernBERT layer": Case(window=7, documents=True, dtype=torch.bfloat16),
    "Gemma layer": Case(
        causal=True, window=9, softcap=4.0, n_heads=4, n_kv_heads=1, n_rows=1, dtype=torch.bfloat16
    ),
    "packed causal GQA": Case(
        causal=True, documents=True, n_heads=4, n_kv_heads=2, layout="heads_first"
    ),
    "prefix and padding": Case(causal=True, prefix=True, lengths=True),
    "query stream": Case(order="strict", lengths=True, bias="dense_all"),
    "soft-cap under a learned bias": Case(softcap=2.0, bias="bucket", lengths=True),
    "everything at once": Case(
        causal=True, window=13, lengths=True, documents=True, prefix=True, order="loose",
        bias="dense_by_head", softcap=3.0, n_heads=2, n_kv_heads=1, layout="sliced",
    ),
    "cross attention, padded source": Case(n_queries=19, n_keys=40, lengths=True),
    "one query, one key": Case(n_queries=1, n_keys=1, causal=True),
    "one query, many keys": Case(n_queries=1, n_keys=67, causal=True, window=20),
    "many queries, one key": Case(n_queries=67, n_keys=1),
    "queries before all keys": Case(n_queries=31, n_keys=8, causal=True, window=4),
    "head of 80": Case(width=80, n_rows=1, causal=True, dtype=torch.float16),
    "head of 96": Case(width=96, n_rows=1, n_queries=20, n_keys=20),
    "head of 256": Case(width=256, n_rows=1, n_heads=1, n_kv_heads=1, n_queries=20, n_keys=20),
    "head of 20": Case(width=20, n_rows=1, causal=True),
} | {
    # One less than two tiles, two tiles, one more: a tile is just whole, or just not.
    f"window of {width}": Case(
        n_rows=1, n_heads=1, n_kv_heads=1, n_queries=52, n_keys=52, window=width
    )
    for width in (31, 32, 33)
}  # fmt: skip

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

MIXED = {
    "bf16 autocast, fp32 T5 table": Case(
        dtype=BF16, bias="bucket", bias_dtype=FP32, autocast=BF16, causal=True
    ),
    "bf16 autocast, fp32 dense bias": Case(
        dtype=BF16, bias="dense_by_head", bias_dtype=FP32, autocast=BF16
    ),
    "fp16 autocast, fp32 slopes": Case(dtype=FP16, bias="alibi", bias_dtype=FP32, autocast=FP16),
    "fp32 queries, bf16 T5 table": Case(bias="bucket", bias_dtype=BF16),
    "fp32 queries, fp16 dense bias": Case(bias="dense", bias_dtype=FP16, causal=True),
    "fp32 queries, bf16 slopes": Case(bias="alibi", bias_dtype=BF16, n_keys=41),
}
"""What autocast and FSDP hand in: 16-bit activations beside float32 parameters, and the reverse.
In the last three all sums are float32, so that a bias which is rounded again shows."""

ALONE: dict[str, Any] = {"n_rows": 1, "n_heads": 1, "n_kv_heads": 1}
LARGE = {
    "1100 keys": Case(**ALONE, n_queries=70, n_keys=1100, causal=True),
    # Two tiles of 128: the second has a diagonal of its own, and an edge of the window.
    "150 tokens, causal": Case(**ALONE, n_queries=150, n_keys=150, causal=True),
    "150 tokens, window of 70": Case(**ALONE, n_queries=150, n_keys=150, window=70),
    "1100 queries": Case(**ALONE, n_queries=1100, n_keys=70),
    "1100 keys in bfloat16": Case(**ALONE, n_queries=5, n_keys=1100, dtype=BF16),
    "nine rows": Case(n_rows=9, n_queries=5, n_keys=5, lengths=True),
    "eighteen heads": Case(n_heads=18, n_kv_heads=6, n_queries=5, n_keys=5),
    "head of 128": Case(**ALONE, width=128, n_queries=20, n_keys=20),
    "large scores": Case(**ALONE, size=12.0),
    "large scores in bfloat16": Case(**ALONE, size=12.0, dtype=BF16),
}
"""Beyond the sizes of the others: more tiles, rows, heads and features, and scores of some 700. Of
these bfloat16 shows what overflows; what is off by less than half shows in float32 alone."""
