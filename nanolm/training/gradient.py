"""GradientRule: how one optimizer step gets its gradient.

A rule is called as `rule(learner, micro_batches, backward)` once per step, where `learner` is the
`Engine` that runs the Learner on its device, precision and ranks. It runs the learner as often as
it likes and hands each result to `backward`, which divides by the global target counts,
scales (fp16) and calls autograd; gradients add up in `.grad`. The default below is plain gradient
accumulation; adversarial training, R-Drop or distillation wrap another rule, one file each (see
`nanolm/rules/`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from nanolm.errors import require
from nanolm.objectives.base import Term
from nanolm.registry import RULES, Options
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import RuleEngine


class Backward:
    """Turns the terms of one forward pass into gradients of the step's total.

        total = sum over terms t of  weight_t * sum_t / C_t

    C_t is the number of t's targets over all ranks and all micro-batches of the step, known before
    the first backward; so k micro-batches on w ranks add up to the gradient of one big batch.
    `scale` is the loss scaling of fp16, `step` the number of steps before this one. The terms' sums
    are kept, as float64 scalars on the device, for the log.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        counts: Mapping[str, float],
        scale: Callable[[Tensor], Tensor] = lambda total: total,
        step: int = 0,
    ) -> None:
        self.weights = weights
        self.counts = counts
        self.scale = scale
        self.step = step
        self.sums: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def __call__(self, terms: Mapping[str, Any], micro_batch: MicroBatch) -> None:
        """Backward of this pass's share of the total.

        A micro-batch without rows stands in on a rank that got none: its tensors only make the
        collectives match, and it counts for nothing.
        """
        # Multiplied by zero rather than left out: DDP and FSDP wait in the backward pass for every
        # parameter's gradient on every rank, so a rank without rows must have one too.
        real = len(micro_batch.row_ids) > 0
        self.differentiate(self.scale(self.total(terms) * (1.0 if real else 0.0)))
        for name, term in terms.items():
            # Sums and not means are logged, and in float64: means of unequal parts cannot be put
            # together afterwards, and float32 loses small terms beside a sum of a million.
            value = term.sum.detach().double()
            # A count that lies on the host goes along with the addition: to copy it first would
            # make the host wait for the device.
            count = torch.as_tensor(term.count).detach()
            zero = torch.zeros_like(value)
            self.sums[name] = self.sums.get(name, zero) + (value if real else zero)
            self.seen[name] = self.seen.get(name, zero) + (count if real else zero)

    def differentiate(self, total: Tensor) -> None:
        """Adds the scalar's gradient to `.grad`."""
        total.backward()

    def extended(self, weights: Mapping[str, float], counts: Mapping[str, float]) -> Backward:
        """The same, with more terms to minimise; what is logged goes to the same place."""
        other = copy.copy(self)
        other.weights, other.counts = {**self.weights, **weights}, {**self.counts, **counts}
        return other

    def weighed(self, weight: float, *, logged: bool) -> Backward:
        """The same, with every term weighed; what is not logged is forgotten."""
        other = copy.copy(self)
        other.weights = {name: weight * own for name, own in self.weights.items()}
        if not logged:
            other.sums, other.seen = {}, {}
        return other

    def total(self, terms: Mapping[str, Any]) -> Tensor:
        """This pass's share of the loss to minimise, a scalar."""
        return share_of_total(terms, self.weights, self.counts)


def share_of_total(
    terms: Mapping[str, Term], weights: Mapping[str, float], counts: Mapping[str, float]
) -> Tensor:
    """What these sums add to the loss to minimise, when `counts` are the whole step's targets."""
    # A count of zero, on a step without a target of this term, must not divide: its sum is zero
    # too.
    total = sum(
        weight * terms[name].sum / max(counts.get(name, 0), 1)
        for name, weight in weights.items()
        if name in terms
    )
    return cast(Tensor, total)  # every objective minimises a term at least


def total_loss(means: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum of the optimised terms' means."""
    return sum(weight * means[name] for name, weight in weights.items() if name in means)


class GradientRule(Protocol):
    """What a rule must be: a callable that leaves the step's gradient in `.grad`."""

    def __call__(
        self, learner: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward, /
    ) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainOptions(Options):
    """Plain gradient accumulation."""

    name: str = "plain"

    def __post_init__(self) -> None:
        # The innermost rule of a chain is read against these options, whatever its name.
        require(
            self.name == "plain", f"train.rule nests three rules at most; {self.name} is too deep"
        )


@RULES.register("plain", options=PlainOptions)
def plain(options: PlainOptions) -> GradientRule:
    """One forward and one backward per micro-batch; ranks exchange gradients in the last."""

    def rule(learner: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward) -> None:
        last = len(micro_batches) - 1
        for number, batch in enumerate(micro_batches):
            # Gradients add up on the rank first and cross the network once: an exchange after each
            # micro-batch would move the same bytes k times for the same sum.
            with learner.synchronised(when=number == last):
                backward(learner(batch), batch)

    return rule


def build_rule(options: Options) -> GradientRule:
    """The gradient rule of the registered name."""
    return RULES.get(options.name).build(options)
