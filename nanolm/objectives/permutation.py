"""Permutation language modelling: predict tokens in a random order (Yang et al. 2019).

    loss = - sum_i log p(x_{z_i} | what is not predicted, x_{z_1}, …, x_{z_{i-1}}, the place z_i)

A row is raw tokens <sep> <cls>, and what it is predicted from may begin earlier: `memory` tokens
that stand before it in the text. With `recurrence` a row is several such segments of a text, each
of which reuses the hidden states of the one before for its memory.

One token in K is predicted (section 2.3), in stretches (section 3.1): a segment is cut into
contexts of K L tokens, L drawn uniformly from 1 to 5, and a stretch of L tokens at a uniformly
drawn place of each context is taken. All orders z of the predicted tokens are equally likely; a
token that is not predicted, <sep> and <cls> among them, is seen by all of its segment and sees no
predicted one.

Two streams tell the two things that a place needs: what stands there, and that something does (see
model/two_stream.py). With o the place of a token in the order, 0 for all that is not predicted, a
content query sees keys of order <= o and the query of a predicted place those of order < o, that
is <= o - 1: so one Mask serves both, and both streams are one batch.

Shapes: B batch, T tokens, P places that are predicted and M tokens of memory of a segment, C
segments of a row, D model width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor, nn

from nanolm.config.ranges import Count
from nanolm.config.schema import Config
from nanolm.data.rows import Row, count_targets
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.model.heads import HeadRequest
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import IGNORED, Draw, Example, Term, TokenLossOptions, token_terms
from nanolm.objectives.mlm import padded
from nanolm.ops.masks import Mask
from nanolm.registry import OBJECTIVES

UNSEEN = np.iinfo(np.int32).max
"""Order of padding as a key: no query comes so late."""
BLIND = -1
"""Order of padding as a query: no key comes so early."""
SEGMENTED = ("tokens", "segments", "places", "order", "key_order")
"""Arrays of a batch that hold one segment after another."""
CLS_SEGMENT = 2
"""Segment of <cls>, which stands apart from the texts of a row, 0 and 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PermutationOptions(TokenLossOptions):
    """Permutation language modelling."""

    name: str = "permutation"
    one_in: int = 6
    """One token in so many is predicted (the paper's K)."""
    longest_span: int = 5
    """Stretches that are predicted have 1 to so many tokens, each length as often as the others."""
    memory: int = 0
    """Tokens before a segment whose hidden states it reads, without a gradient; 0 for none. For a
    row's first segment a forward pass over them is the price."""
    recurrence: Count = 1
    """Segments of a row, data.row_length / recurrence tokens each: all but the first reuse hidden
    states of the one before as their memory (Dai et al. 2019, section 3.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.one_in >= 2, f"objective.one_in={self.one_in} must be at least 2")
        require(
            self.longest_span >= 1,
            f"objective.longest_span={self.longest_span} must be at least 1",
        )
        require(self.memory >= 0, f"objective.memory={self.memory} must not be negative")

    def n_predicted(self, n_tokens: int) -> int:
        """How many of a segment's tokens are predicted: one in K exactly, one of fewer than K."""
        return max(n_tokens // self.one_in, min(n_tokens, 1))

    def places(self, n_tokens: int, rng: np.random.Generator) -> np.ndarray:
        """Sorted int64 [n_predicted]: the places of the stretches. What K leaves of a segment
        over stands before the first context or behind the last, cut at a uniformly drawn
        place."""
        left = self.n_predicted(n_tokens)
        context = min(self.one_in, max(n_tokens, 1))  # of one predicted token
        begin = int(rng.integers(n_tokens - left * context + 1))
        found = []
        while left:
            length = min(int(rng.integers(1, self.longest_span + 1)), left)
            offset = int(rng.integers(length * context - length + 1))
            found.append(np.arange(begin + offset, begin + offset + length, dtype=np.int64))
            begin, left = begin + length * context, left - length
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


@OBJECTIVES.register("permutation", options=PermutationOptions)
class Permutation:
    """A share of the tokens is predicted, each from the rest and from those that came before it."""

    trunks = ("two_stream",)
    n_specials = 2  # <sep> and <cls>

    def __init__(self, options: PermutationOptions, config: Config, tokenizer: Tokenizer) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.recurrence, self.memory = options.recurrence, options.memory
        self.length = config.data.row_length // self.recurrence  # of a segment
        self.n_text = self.length - self.n_specials
        self.stride = self.recurrence * self.n_text
        self.span = self.memory + self.stride
        self.check(config)
        self.n_places = options.n_predicted(self.n_text)
        self.predicted_share = self.n_places / self.length
        self.tells_segments = config.model.n_segments > 0
        self.heads = {"lm": HeadRequest("token_logits", {"bias": True} | options.used())}
        self.masks = frozenset({"order"})
        self.weights = {"permutation": 1.0}

    def check(self, config: Config) -> None:
        """Raises UserError naming the key that keeps this config from being trained."""
        known = config.model.n_segments
        require(
            not config.data.document_mask,
            "data.document_mask=true cannot go with objective=permutation, whose rows and memory "
            "run across documents; set data.document_mask to false",
        )
        require(
            config.data.rows is None or self.memory == 0,
            f"objective.memory={self.memory} are the tokens before a row, and data.rows="
            f"{config.data.rows} makes rows of unequal length; set objective.memory to 0, or "
            f"data.rows to null",
        )
        length = config.data.row_length
        require(
            length % self.recurrence == 0,
            f"data.row_length={length} cannot be cut in objective.recurrence={self.recurrence} "
            f"segments of one length; use a multiple of {self.recurrence}",
        )
        require(
            self.recurrence == 1 or self.memory > 0,
            f"objective.recurrence={self.recurrence} segments hand on a memory, and objective."
            f"memory={self.memory} leaves none; set it to the tokens that a segment may look back",
        )
        require(
            self.n_text >= 1,
            f"data.row_length={length} leaves no room for tokens beside <sep> and <cls>; use at "
            f"least {3 * self.recurrence}",
        )
        require(
            known == 0 or known > CLS_SEGMENT,
            f"model.n_segments={known} is too few for objective=permutation: two texts and <cls> "
            f"are three; set it to 3, or to 0 for none",
        )

    def example(self, row: Row, rng: np.random.Generator, draw: Draw) -> Example:
        """memory [M], and of each segment tokens [T] with their order and the places [P] of those
        that are predicted."""
        memory, text = np.split(row.tokens.astype(np.int64), [self.memory])
        segments = np.split(text, np.arange(1, self.recurrence) * self.n_text)
        return {"memory": memory, "segments": [self.segment(each, rng) for each in segments]}

    def segment(self, text: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """tokens [T] with their order, the places [P] of those that are predicted."""
        tokens = np.concatenate([text, [self.tokenizer.sep, self.tokenizer.cls]])
        places = self.options.places(len(text), rng)
        order = np.zeros(len(tokens), dtype=np.int64)
        order[places] = 1 + rng.permutation(len(places))
        return {"tokens": tokens, "order": order, "places": places}

    def collate(self, examples: list[Example]) -> dict[str, np.ndarray]:
        """tokens [B, C T], places (in their segment) and targets [B, C P], order [B, C (T + P)] of
        the queries and key_order [B, C (M + T)]; with a memory its tokens [B, M], with
        `model.n_segments` those [B, C T]."""
        parts = [part for e in examples for part in e["segments"]]
        batch = self.collate_segments(parts)
        batch = {name: values.reshape(len(examples), -1) for name, values in batch.items()}
        if self.memory:
            batch["memory"] = np.stack([e["memory"] for e in examples])
        return batch

    def collate_segments(self, parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The same of N segments: tokens [N, T], places [N, P] and so on, without a memory."""
        tokens = [e["tokens"] for e in parts]
        places = [e["places"] for e in parts]
        order = [e["order"] for e in parts]
        of_places = [o[p] - 1 for o, p in zip(order, places, strict=True)]
        targets = [t[p] for t, p in zip(tokens, places, strict=True)]
        seen_first = np.zeros((len(parts), self.memory), dtype=np.int64)
        batch = {
            "tokens": padded(tokens, self.length, self.tokenizer.pad),
            "places": padded(places, self.n_places, 0),
            "targets": padded(targets, self.n_places, IGNORED),
            "order": np.concatenate(
                [padded(order, self.length, BLIND), padded(of_places, self.n_places, BLIND)], axis=1
            ),
            "key_order": np.concatenate([seen_first, padded(order, self.length, UNSEEN)], axis=1),
        }
        if self.tells_segments:
            ends = np.array([len(ids) - 1 for ids in tokens])
            batch["segments"] = np.where(np.arange(self.length) < ends[:, None], 0, CLS_SEGMENT)
        return batch

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Predicted tokens."""
        return {"permutation": count_targets(batch["targets"])}

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """Content with its memory, and the places of the query stream, segment by segment."""
        names = [name for name in SEGMENTED if name in batch]
        parts = zip(*(batch[name].chunk(self.recurrence, dim=1) for name in names), strict=True)
        first, *following = [self.segment_inputs(dict(zip(names, part))) for part in parts]
        return dataclasses.replace(
            first, memory_tokens_BM=batch.get("memory"), following=tuple(following)
        )

    def segment_inputs(self, part: dict[str, Tensor]) -> Inputs:
        """One segment; what stands behind its text, <sep> <cls>, is no memory for the next one."""
        return Inputs(
            tokens_BT=part["tokens"],
            segments_BT=part.get("segments"),
            mask=Mask(order=part["order"], key_order=part["key_order"]),
            places_BP=part["places"],
            n_reused=self.n_text,
        )

    def of_places(self, hidden_BTD: Tensor) -> Tensor:
        """[B, C (T + P), D] -> the query stream's [B, C P, D]."""
        hidden_BCTD = hidden_BTD.unflatten(1, (self.recurrence, -1))
        return hidden_BCTD[:, :, self.length :].flatten(1, 2)

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """The tokens that are predicted, [N]."""
        return batch["targets"][batch["targets"] != IGNORED]

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Logits [N, V] of the predicted tokens, for rules that compare probabilities."""
        hidden_BPD = self.of_places(hidden_BTD)
        return {"permutation": heads["lm"](hidden_BPD[batch["targets"] != IGNORED])}

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The permutation term with nll and accuracy, from the query stream alone."""
        hidden_ND = self.of_places(hidden_BTD).flatten(0, 1)
        targets_N = batch["targets"].flatten()
        return token_terms("permutation", heads["lm"], hidden_ND, targets_N, self.options)
