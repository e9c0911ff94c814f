"""Masked language modelling: predict the tokens that were hidden (Devlin et al. 2019).

    loss = - sum_{t in masked} log p(x_t | corrupted row)

A row is <cls> raw tokens <sep>. Only the masked positions reach the vocabulary projection: the
batch lists them, flat, so no [B, T, V] is ever computed.

Shapes: B batch, T tokens, M masked tokens of the batch, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.rows import Row
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.model.heads import HeadRequest
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import Draw, Example, Term, TokenLossOptions, token_terms
from nanolm.objectives.masking import SELECTORS, corrupt
from nanolm.ops.masks import Mask
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlmOptions(TokenLossOptions):
    """Masked language modelling."""

    name: str = "mlm"
    mask_rate: float = 0.15
    """Share of a row's maskable tokens that is selected."""
    unit: Literal["token", "word", "span"] = "token"
    """What is selected: single tokens, whole words, or spans of words."""
    mask_share: float = 0.8
    """Share of the selected tokens that becomes <mask>."""
    random_share: float = 0.1
    """Share of the selected tokens that becomes a random token; the rest stays."""
    transform: bool = True
    """Dense + GELU + norm before the vocabulary, and a bias on it, as in BERT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rate, kept = self.mask_rate, self.mask_share + self.random_share
        require(0 < rate < 1, f"objective.mask_rate={rate} must lie in (0, 1)")
        require(
            min(self.mask_share, self.random_share) >= 0 and kept <= 1,
            "objective.mask_share and objective.random_share must be shares that sum to at most 1",
        )


@OBJECTIVES.register("mlm", options=MlmOptions)
class Mlm:
    """A share of the tokens is hidden and predicted from both sides."""

    trunks = ("encoder",)
    n_specials = 2  # <cls> and <sep>

    def __init__(self, options: MlmOptions, config: Config, tokenizer: Tokenizer) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.length = config.data.row_length
        self.documents = config.data.document_mask
        self.stride = self.span = self.length - self.n_specials
        require(self.stride > 0, f"data.row_length={self.length} leaves no room for tokens")
        shape = {"transform": options.transform, "bias": options.transform}
        self.heads = {"lm": HeadRequest("token_logits", shape | options.used())}
        self.masks = frozenset({"lengths", "documents"} if self.documents else {"lengths"})
        self.weights = {"mlm": 1.0}

    def example(self, row: Row, rng: np.random.Generator, draw: Draw) -> Example:
        """<cls> row <sep>, with the masked positions and what stood there."""
        tokens = self.tokenizer
        tokens_T = np.concatenate([[tokens.cls], row.tokens, [tokens.sep]]).astype(np.int64)
        document = np.zeros(len(tokens_T), dtype=np.int64)
        # <cls> belongs to the first document of the row and <sep> to the last: apart from both they
        # would see nothing but themselves.
        document[1 + row.starts[1:]] = 1
        return self.mask(tokens_T, rng) | {"documents": np.cumsum(document)}

    def mask(self, tokens_T: np.ndarray, rng: np.random.Generator) -> Example:
        """tokens (corrupted), masked_index and masked_targets of one row."""
        options = self.options
        index = SELECTORS[options.unit](tokens_T, self.tokenizer, options.mask_rate, rng)
        corrupted = corrupt(
            tokens_T,
            index,
            self.tokenizer,
            rng,
            mask_share=options.mask_share,
            random_share=options.random_share,
        )
        return {"tokens": corrupted, "masked_index": index, "masked_targets": tokens_T[index]}

    def collate(self, examples: list[Example]) -> dict[str, np.ndarray]:
        """tokens [B, T], masked_index and masked_targets [M] (flat in B x T), lengths [B] if a row
        is short, and with the document mask positions and documents [B, T]."""
        batch = {
            "tokens": padded([e["tokens"] for e in examples], self.length, self.tokenizer.pad),
            "masked_index": np.concatenate(
                [e["masked_index"] + b * self.length for b, e in enumerate(examples)]
            ),
            "masked_targets": np.concatenate([e["masked_targets"] for e in examples]),
        }
        lengths = np.array([len(e["tokens"]) for e in examples], dtype=np.int64)
        if lengths.min() < self.length:  # only where a split ends: full rows need no mask at all
            batch["lengths"] = lengths
        if self.documents:
            batch["documents"] = padded([e["documents"] for e in examples], self.length, -1)
            batch["positions"] = restarting_positions(batch["documents"])
        return batch

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Masked tokens."""
        return {"mlm": len(batch["masked_targets"])}

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """Tokens, with padding hidden as keys and documents apart if so configured."""
        return Inputs(
            tokens_BT=batch["tokens"],
            positions_BT=batch.get("positions"),
            mask=self.input_mask(batch),
        )

    def input_mask(self, batch: dict[str, Tensor]) -> Mask:
        """Key lengths where rows are padded; documents where they are kept apart."""
        if self.documents:  # padding is document -1: it sees, and is seen by, padding only
            return Mask(documents=batch["documents"])
        return Mask(key_lengths=batch.get("lengths"))

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """The tokens that were hidden, [M]."""
        return batch["masked_targets"]

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Logits [M, V] of the masked tokens, for rules that compare probabilities."""
        return {"mlm": heads["lm"](hidden_BTD.flatten(0, 1)[batch["masked_index"]])}

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The mlm term with nll and accuracy, from the M masked positions only."""
        # Gathered before the head: the vocabulary is projected for one token in seven, not for all.
        hidden_MD = hidden_BTD.flatten(0, 1)[batch["masked_index"]]
        return token_terms("mlm", heads["lm"], hidden_MD, batch["masked_targets"], self.options)


def padded(rows: list[np.ndarray], length: int, value: int) -> np.ndarray:
    """int64 [B, length]: rows side by side, filled up with value."""
    batch = np.full((len(rows), length), value, dtype=np.int64)
    for target, row in zip(batch, rows, strict=True):
        target[: len(row)] = row
    return batch


def restarting_positions(documents_BT: np.ndarray) -> np.ndarray:
    """int64 [B, T]: each token's index within its document."""
    index = np.broadcast_to(np.arange(documents_BT.shape[1]), documents_BT.shape)
    begins = np.ones_like(documents_BT, dtype=bool)
    begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
