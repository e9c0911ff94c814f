"""What all contestants of a benchmark share: the shape and its FLOPs."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from nanolm.config.model import ModelConfig
from nanolm.config.ranges import Count, Within
from nanolm.training.flops import train_flops_per_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One model and batch, the same for every contestant."""

    n_layers: Count = 6
    """Blocks."""
    d_model: Count = 384
    """Width."""
    n_heads: Count = 6
    """Heads."""
    row_length: Annotated[int, Within(2, 1 << 31)] = 256
    """Tokens of a row."""
    batch: Count = 16
    """Rows of a step."""
    vocab_size: Count = 8192
    """Tokens of the vocabulary."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.row_length

    @property
    def n_masked(self) -> int:
        """Masked positions of a row in MLM: 15 % of all but <cls> and <sep>."""
        return round(0.15 * (self.row_length - 2))


PHASES = ("data", "forward", "loss", "backward", "optimizer")


def step_flops(shape: Shape, objective: str) -> float:
    """Model FLOPs of one step, by formula (`flops.py`)."""
    model = ModelConfig(
        trunk="decoder" if objective == "clm" else "encoder",
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        vocab_size=shape.vocab_size,
        max_length=shape.row_length,
    )
    share = 1.0 if objective == "clm" else shape.n_masked / shape.row_length
    return shape.tokens * train_flops_per_token(model, shape.row_length, predicted_share=share)
