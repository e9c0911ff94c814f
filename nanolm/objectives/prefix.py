"""Prefix language modelling: read a prefix in both directions, write the rest causally.

    loss = - sum_{t >= P} log p(x_{t+1} | x_1 .. x_t),  tokens before P see each other
    (Raffel et al. 2020, section 3.2.1)

The prefix length P is drawn per row, uniformly from [1, T - 1].

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor

from nanolm.config.schema import Config
from nanolm.data.rows import Row, fill_blocks
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import IGNORED, Draw, Example, TokenLossOptions
from nanolm.objectives.clm import Clm
from nanolm.ops.masks import Mask
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixOptions(TokenLossOptions):
    """Prefix language modelling."""

    name: str = "prefix"


@OBJECTIVES.register("prefix", options=PrefixOptions)
class Prefix(Clm):
    """Causal language modelling behind a bidirectional prefix of random length."""

    batch = None  # type: ignore[assignment]  # the prefix is random: rows go through `example`

    def __init__(self, options: PrefixOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        require(
            not self.documents,
            "data.document_mask=true cannot go with objective=prefix: a prefix crosses documents",
        )
        self.masks = frozenset({"prefix"})

    def example(self, row: Row, rng: np.random.Generator, draw: Draw) -> Example:
        """The row and its prefix length in tokens."""
        n_tokens = min(len(row.tokens), self.length)
        return row, int(rng.integers(1, max(2, n_tokens)))

    def collate(self, examples: Any) -> dict[str, np.ndarray]:
        """tokens, targets [B, T] and prefix_lengths [B]; targets inside the prefix are ignored."""
        rows, prefixes = zip(*examples, strict=True)
        batch = fill_blocks(list(rows), self.length, with_documents=False)
        batch["prefix_lengths"] = np.array(prefixes, dtype=np.int64)
        # The hidden state at t predicts token t + 1, which it must not have seen: t + 1 >= P.
        seen = np.arange(1, self.length + 1)[None, :] < batch["prefix_lengths"][:, None]
        batch["targets"][seen] = IGNORED
        return batch

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """Tokens with the prefix mask."""
        return Inputs(tokens_BT=batch["tokens"], mask=Mask(prefix_lengths=batch["prefix_lengths"]))
