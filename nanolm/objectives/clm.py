"""Causal language modelling: predict every next token (Radford et al. 2019).

    loss = - sum_t log p(x_{t+1} | x_1 .. x_t)

A row of T inputs reads T + 1 raw tokens and advances by T, so each token of the stream is a target
exactly once in an epoch.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.rows import Row, RowBlock, count_targets, fill_blocks
from nanolm.data.tokenizer import Tokenizer
from nanolm.model.heads import HeadRequest
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import (
    IGNORED,
    Draw,
    Example,
    Term,
    TokenLossOptions,
    token_terms,
)
from nanolm.ops.masks import Mask
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClmOptions(TokenLossOptions):
    """Causal language modelling."""

    name: str = "clm"


@OBJECTIVES.register("clm", options=ClmOptions)
class Clm:
    """Every token predicts the next one."""

    trunks: tuple[str, ...] = ("decoder",)

    def __init__(self, options: TokenLossOptions, config: Config, tokenizer: Tokenizer) -> None:
        self.options = options
        self.length = config.data.row_length
        self.documents = config.data.document_mask
        # The extra token is the last one's target, and the first input of the next row: every token
        # of the stream is a target exactly once.
        self.stride, self.span = self.length, self.length + 1
        self.heads = {"lm": HeadRequest("token_logits", options.used())}
        self.masks: frozenset[str] = frozenset({"documents"} if self.documents else ())
        self.weights = {"clm": 1.0}

    def example(self, row: Row, rng: np.random.Generator, draw: Draw) -> Example:
        """The row as it is: nothing about it is random."""
        return row

    def collate(self, examples: list[Example] | RowBlock) -> dict[str, np.ndarray]:
        """tokens, targets [B, T], and with the document mask positions and documents [B, T]."""
        return fill_blocks(examples, self.length, with_documents=self.documents)

    def batch(self, rows: RowBlock) -> dict[str, np.ndarray]:
        """`collate` of all rows' examples: the loader's short cut where nothing is random."""
        return self.collate(rows)

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Targets that are not padding."""
        return {"clm": count_targets(batch["targets"])}

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """Tokens; with the document mask also positions that restart in each document."""
        if not self.documents:
            return Inputs(tokens_BT=batch["tokens"])
        return Inputs(
            tokens_BT=batch["tokens"],
            positions_BT=batch["positions"],
            mask=Mask(documents=batch["documents"]),
        )

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """The next tokens that are predicted, [N]."""
        return batch["targets"][batch["targets"] != IGNORED]

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Logits [N, V] of the targets, for rules that compare probabilities."""
        # The host waits here for N, the number of targets, which the device alone knows.
        return {"clm": heads["lm"](hidden_BTD[batch["targets"] != IGNORED])}

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The clm term with nll and accuracy."""
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch["targets"].flatten()
        return token_terms("clm", heads["lm"], hidden_ND, targets_N, self.options)
