"""What an objective is: numpy on the data side, torch on the loss side, never a model.

    RowStream --row--> example(row, rng, draw) --> collate(examples) --> batch --> inputs(batch)
    --> trunk --> hidden --> loss(hidden, heads, batch) --> {term: (sum, count)}

All randomness is in `example`, from a generator keyed by (seed, epoch, row id): what a row becomes
does not depend on workers, ranks or resumes. The loss returns *sums with their counts*; the trainer
divides once, by the count over all micro-batches and ranks, so that uneven target counts give the
gradient of one big batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.rows import Row
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.model.heads import HeadRequest, TokenLogits
from nanolm.model.trunk import Inputs
from nanolm.registry import Options

IGNORED = -100
"""Target value of positions that are not predicted."""

Example: TypeAlias = Any
"""What `example` returns is the objective's own: only its `collate` reads it."""
Draw = Callable[[int], Row]


class Term(NamedTuple):
    """A sum over targets (scalar, float32) and the number of targets it runs over."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLossOptions(Options):
    """Options that every loss over the vocabulary shares."""

    label_smoothing: float = 0.0
    """Share of the target distribution spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-partition, which keeps logits from drifting (try 1e-4)."""

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, f"objective.label_smoothing={smoothing} must lie in [0, 1)")
        require(self.z_loss >= 0, f"objective.z_loss={self.z_loss} must not be negative")

    def used(self) -> dict[str, bool]:
        """Which of them are in use: what a kernel must be able to do."""
        return {"label_smoothing": self.label_smoothing > 0, "z_loss": self.z_loss > 0}


class ForwardObjective(Protocol):
    """What a forward pass of the Learner asks. Every objective answers; so does what a gradient
    rule or an evaluation puts in its place for a pass, whose `loss` may bring more than terms."""

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """What the trunk reads."""

    def loss(self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]) -> Any:
        """What the pass returns."""


class Objective(ForwardObjective, Protocol):
    """The contract. Built as `build(options, config, tokenizer)`."""

    trunks: tuple[str, ...]
    """Registered trunks that it can train."""
    heads: dict[str, HeadRequest]
    """The heads that it needs, by name: their weights are saved as `heads.<name>.…`."""
    masks: frozenset[str]
    """Mask kinds (nanolm.ops.masks.KINDS) that its batches may bring."""
    weights: dict[str, float]
    """Terms to be minimised with their weights; other terms are metrics only."""
    stride: int
    """Raw tokens that each row advances in the token stream."""
    span: int
    """Raw tokens that each row reads; span - stride of them belong to the next row too."""
    # Five more are optional: `schema`, the schema of a run that trains it (Config where it is
    # missing), `arrange_for(kernels)`, called once with the kernels that the model got, and
    # `target_counts(counts)`, for one whose targets hold tokens that no text has: how often each is
    # a target, from how often it stands in the text. The unigram model that is compared uses it.
    # `predicted_share`, targets to a token of a row, lets `nanolm estimate` reckon without data; so
    # do `memory`, tokens before a row that a pass without a gradient reads, and `recurrence`, the
    # segments of a row that are read one after another.

    def example(self, row: Row, rng: np.random.Generator, draw: Draw) -> Example:
        """One row made ready; `draw(k)` gives the k-th keyed other row."""

    def collate(self, examples: list[Example]) -> dict[str, np.ndarray]:
        """Examples of equal or unequal length as one batch; no randomness."""

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Number of targets of each term in `weights`."""

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """The token ids [N] that the main term predicts, for bits per byte and unigram models."""

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """(Optional.) For each term that is a choice among classes, the logits [N, C] of its N
        targets: what R-Drop and distillation compare."""

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """Terms by name; "nll" and "accuracy" are always among them, as metrics."""


Build = Callable[[Options, Config, Tokenizer], Objective]


def length_of(x: Tensor) -> Tensor:
    """len(x) as an int64 scalar beside x: a Term's count.

    The device fills it in by itself. `torch.tensor(len(x), device=…)` is a copy from the host's
    memory, for which the host waits until the device has done all that was asked of it before.
    """
    return torch.full((), len(x), device=x.device)


def token_terms(
    name: str, head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, options: TokenLossOptions
) -> dict[str, Term]:
    """The terms of a loss over the vocabulary: `name` (optimised), nll and accuracy (metrics)."""
    # On the device, and never divided here: only the trainer knows how many targets the whole step
    # has.
    count = (targets_N != IGNORED).sum()
    out = cast(TokenLogits, head).cross_entropy(
        hidden_ND, targets_N, label_smoothing=options.label_smoothing, z_loss=options.z_loss
    )
    return {
        name: Term(out.loss, count),
        "nll": Term(out.nll.sum(), count),
        "accuracy": Term(out.correct.sum(), count),
    }
