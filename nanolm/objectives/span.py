"""Span corruption: write down what was cut out of a text (Raffel et al. 2020, section 3.1.4).

    raw      Thank you for inviting me to your party last week .
    source   Thank you <2> me to your party <1> week . <eos>
    targets  <2> for inviting <1> last <eos>

    loss = - sum_t log p(target_t | source, targets before t)

Of a row of n raw tokens noise = round(density n) are cut out, in spans = round(noise / mean span)
stretches, both at least 1. Text and noise take turns, text first and noise last; each is cut into
non-empty parts at places drawn uniformly. Where a stretch stood the source has a sentinel, the
first the highest of the tokenizer's extra ids and each further one a lower; the targets name each
sentinel before its stretch. Rows are of that length whose source fills data.row_length exactly, so
neither side of a full batch is padded. Ends of documents inside a row are tokens like others.

Shapes: B batch, S source tokens, T target tokens, N targets, D model width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor, nn

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanOptions(TokenLossOptions):
    """Span corruption."""

    name: str = "span"
    noise_density: float = 0.15
    """Share of a row's tokens that is cut out."""
    mean_span: float = 3.0
    """Mean number of tokens of a stretch that is cut out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        density, mean = self.noise_density, self.mean_span
        require(0 < density < 1, f"objective.noise_density={density} must lie in (0, 1)")
        require(mean >= 1, f"objective.mean_span={mean} must be at least 1")

    def counts(self, n_tokens: int) -> tuple[int, int]:
        """(noise tokens, spans) of a row; one token alone stays as it is. Halves go to even."""
        if n_tokens < 2:
            return 0, 0
        noise = min(max(round(n_tokens * self.noise_density), 1), n_tokens - 1)
        return noise, max(1, round(noise / self.mean_span))

    def lengths(self, n_tokens: int) -> tuple[int, int]:
        """(source, targets) of a row: each has its sentinels and one end."""
        noise, spans = self.counts(n_tokens)
        return n_tokens - noise + spans + 1, noise + spans + 1

    def raw_length(self, source_length: int) -> int:
        """The most raw tokens whose source is no longer than this. One token more makes the source
        longer by one or not at all, so every length of 2 and above is met exactly."""
        n_tokens = 1
        while self.lengths(n_tokens + 1)[0] <= source_length:
            n_tokens += 1
        return n_tokens


@OBJECTIVES.register("span", options=SpanOptions)
class Span:
    """Stretches of a text are cut out, and a decoder writes them."""

    trunks = ("encoder_decoder",)

    def __init__(self, options: SpanOptions, config: Config, tokenizer: Tokenizer) -> None:
        self.options = options
        self.length = config.data.row_length
        self.pad, self.eos = tokenizer.pad, tokenizer.eos
        self.stride = self.span = options.raw_length(self.length)
        self.n_targets = options.lengths(self.span)[1]
        self.predicted_share = self.n_targets / self.length
        self.sentinels = np.array(sorted(tokenizer.extra_ids, reverse=True), dtype=np.int64)
        self.check(config)
        self.heads = {"lm": HeadRequest("token_logits", options.used())}
        self.masks = frozenset({"lengths"})
        self.weights = {"span": 1.0}

    def check(self, config: Config) -> None:
        """Raises UserError naming the key that keeps this config from being trained."""
        options, most = self.options, config.model.max_length
        require(
            not config.data.document_mask,
            "data.document_mask=true cannot go with objective=span: a sentinel's stretch may cross "
            "documents; set data.document_mask to false",
        )
        require(
            self.span >= 2,
            f"data.row_length={self.length} leaves no room for text, a sentinel and an end; use at "
            f"least 3",
        )
        apart = all(
            spans <= n - noise
            for n in range(2, self.span + 1)
            for noise, spans in [options.counts(n)]
        )
        require(
            apart,
            f"objective.noise_density={options.noise_density} with objective.mean_span="
            f"{options.mean_span} leaves less than one token between two spans; lower the first or "
            f"raise the second",
        )
        require(
            self.n_targets <= most,
            f"data.row_length={self.length} gives {self.n_targets} targets, more than "
            f"model.max_length={most}; raise that",
        )
        spans = options.counts(self.span)[1]
        known = len(self.sentinels)
        require(
            spans <= known,
            f"objective=span needs {spans} sentinels for data.row_length={self.length}, and the "
            f"tokenizer has {known}; lower data.row_length, raise objective.mean_span, or prepare "
            f"the data again with --extra_tokens {spans} (or more)",
        )

    def example(self, row: Row, rng: np.random.Generator, draw: Draw) -> Example:
        """source [S] and targets [T] of one row, both with their ends."""
        tokens = row.tokens.astype(np.int64)
        noise, spans = self.options.counts(len(tokens))
        text_lengths = cut(len(tokens) - noise, spans, rng)
        noise_lengths = cut(noise, spans, rng)
        # Text, noise, text, noise, …; what stands behind them, a row of one token at most, is text.
        ends = np.stack([text_lengths, noise_lengths], axis=1).ravel().cumsum()
        *pieces, rest = np.split(tokens, ends)
        source, targets = [], []
        for index in range(spans):
            sentinel = self.sentinels[index : index + 1]
            source += [pieces[2 * index], sentinel]
            targets += [sentinel, pieces[2 * index + 1]]
        source.append(rest)
        end = np.array([self.eos], dtype=np.int64)
        return {
            "source": np.concatenate([*source, end]),
            "targets": np.concatenate([*targets, end]),
        }

    def collate(self, examples: list[Example]) -> dict[str, np.ndarray]:
        """source [B, S], tokens and targets [B, T], and lengths [B] of the sources if a row is
        short. The decoder reads the targets one place later, behind a pad."""
        targets_BT = padded([e["targets"] for e in examples], self.n_targets, IGNORED)
        batch = {
            "source": padded([e["source"] for e in examples], self.length, self.pad),
            "tokens": shifted_right(targets_BT, self.pad),
            "targets": targets_BT,
        }
        lengths = np.array([len(e["source"]) for e in examples], dtype=np.int64)
        if lengths.min() < self.length:  # only where a split ends: full rows need no mask at all
            batch["lengths"] = lengths
        return batch

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Targets that are not padding."""
        return {"span": count_targets(batch["targets"])}

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """The targets so far, and the source with its padding hidden."""
        return Inputs(
            tokens_BT=batch["tokens"],
            source_tokens_BS=batch["source"],
            source_mask=Mask(key_lengths=batch.get("lengths")),
        )

    def target_counts(self, counts_V: np.ndarray) -> np.ndarray:
        """How often each token is a target in an epoch, as expected: the share of it that is cut
        out, and in each row every sentinel and the end once more."""
        noise, spans = self.options.counts(self.span)
        rows = counts_V.sum() / self.span
        found_V = counts_V * (noise / self.span)
        found_V[self.sentinels[:spans]] += rows
        found_V[self.eos] += rows
        return found_V

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """Sentinels, what they stand for, and ends, [N]."""
        return batch["targets"][batch["targets"] != IGNORED]

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Logits [N, V] of the targets, for rules that compare probabilities."""
        return {"span": heads["lm"](hidden_BTD[batch["targets"] != IGNORED])}

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The span term with nll and accuracy."""
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch["targets"].flatten()
        return token_terms("span", heads["lm"], hidden_ND, targets_N, self.options)


def shifted_right(targets_BT: np.ndarray, pad: int) -> np.ndarray:
    """int64 [B, T]: what a decoder reads to write these targets, each one place later behind a pad;
    what fills the targets up is a pad too."""
    tokens_BT = np.full_like(targets_BT, pad)
    tokens_BT[:, 1:] = np.where(targets_BT == IGNORED, pad, targets_BT)[:, :-1]
    return tokens_BT


def cut(n_items: int, n_parts: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [n_parts]: lengths, all above 0, of the parts of n_items, all ways to cut these being
    equally likely: n_parts - 1 marks are shuffled over the places between two items."""
    marks = np.zeros(max(n_items - 1, 0), dtype=bool)
    marks[: n_parts - 1] = n_parts > 0
    rng.shuffle(marks)
    ends = np.append(np.flatnonzero(marks) + 1, n_items)
    return np.diff(ends, prepend=0)[:n_parts]
