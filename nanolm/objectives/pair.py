"""MLM with a second question about a pair of segments: <cls> A <sep> B <sep>.

    nsp   does B follow A, or come from elsewhere?      (Devlin et al. 2019, section 3.1)
    sop   is B what follows A, or do they stand swapped? (Lan et al. 2020, section 3.1)

Each pair is broken with a probability of one half. The pair term has its own denominator (rows), so
it and the token term never share one.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.rows import Row
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.model.heads import HeadRequest
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import Draw, Example, Term, length_of
from nanolm.objectives.mlm import Mlm, MlmOptions, padded
from nanolm.ops.reference import upcast
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlmPairOptions(MlmOptions):
    """Masked language modelling with next-sentence or sentence-order prediction."""

    name: str = "mlm_pair"
    pair: Literal["nsp", "sop"] = "nsp"
    """nsp: B is from elsewhere in half of the rows; sop: A and B are swapped in half of them."""


@OBJECTIVES.register("mlm_pair", options=MlmPairOptions)
class MlmPair(Mlm):
    """MLM plus a decision about the pair, read from <cls>."""

    options: MlmPairOptions
    n_specials = 3  # <cls> A <sep> B <sep>

    def __init__(self, options: MlmPairOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        require(
            config.model.n_segments >= 2,
            "objective=mlm_pair tells A from B by segment embeddings: set model.n_segments=2",
        )
        require(
            not self.documents,
            "data.document_mask=true cannot go with objective=mlm_pair: a pair is one document",
        )
        self.heads["pair"] = HeadRequest("pooled", {"n_classes": 2})
        self.weights = {"mlm": 1.0, options.pair: 1.0}

    def example(self, row: Row, rng: np.random.Generator, draw: Draw) -> Example:
        """The row cut in two somewhere in its middle half; label 1 when the pair is broken."""
        cut = int(rng.integers(len(row.tokens) // 4, max(1, 3 * len(row.tokens) // 4) + 1))
        first, second = row.tokens[:cut], row.tokens[cut:]
        broken = bool(rng.integers(0, 2))
        if broken and self.options.pair == "sop":
            first, second = second, first
        elif broken:
            second = draw(0).tokens[: len(second)]
        t = self.tokenizer
        tokens_T = np.concatenate([[t.cls], first, [t.sep], second, [t.sep]]).astype(np.int64)
        segments = np.zeros(len(tokens_T), dtype=np.int64)
        segments[len(first) + 2 :] = 1
        return self.mask(tokens_T, rng) | {"segments": segments, "broken": np.int64(broken)}

    def collate(self, examples: list[Example]) -> dict[str, np.ndarray]:
        """As MLM, with segments [B, T] and broken [B]."""
        batch = super().collate(examples)
        batch["segments"] = padded([e["segments"] for e in examples], self.length, 0)
        batch["broken"] = np.array([e["broken"] for e in examples], dtype=np.int64)
        return batch

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Masked tokens, and pairs."""
        return super().counts(batch) | {self.options.pair: len(batch["broken"])}

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """Tokens with segments."""
        return dataclasses.replace(super().inputs(batch), segments_BT=batch["segments"])

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The MLM terms, the pair's cross-entropy, and its accuracy."""
        name, broken = self.options.pair, batch["broken"]
        logits_BC = upcast(heads["pair"](hidden_BTD))
        count = length_of(broken)
        right = (logits_BC.argmax(dim=-1) == broken).float().sum()
        pair_loss = F.cross_entropy(logits_BC, broken, reduction="sum")
        return super().loss(hidden_BTD, heads, batch) | {
            name: Term(pair_loss, count),
            f"{name}_accuracy": Term(right, count),
        }
