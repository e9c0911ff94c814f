"""R-Drop: two passes with different dropout should say the same (Liang et al. 2021, section 2).

    L = (L_1 + L_2) / 2 + alpha (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2        per target

(The paper adds L_1 and L_2 up and its code takes the mean; the mean keeps the learning rate's
meaning.) Without dropout both passes are equal and the second term is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nanolm.errors import require
from nanolm.objectives.base import ForwardObjective, Term
from nanolm.registry import RULES
from nanolm.rules.base import WithLogits, Wrapped, WrapperOptions, logits_in, only_terms
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import RuleEngine
from nanolm.training.gradient import Backward, GradientRule, build_rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class RDropOptions(WrapperOptions):
    """Consistency of two passes with different dropout."""

    name: str = "rdrop"
    alpha: float = 1.0
    """Weight of the symmetric Kullback-Leibler divergence (the paper uses 0.3 to 5)."""

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"train.rule.alpha={self.alpha} must not be negative")


class Twice(Wrapped):
    """An engine that runs each micro-batch twice: mean terms, and `<term>_rdrop` beside them."""

    def __call__(self, batch: MicroBatch, objective: ForwardObjective | None = None) -> Any:
        """Terms of one micro-batch; if asked for, the logits of the first pass."""
        asked = objective or self.engine.learner.objective
        first = self.engine(batch, WithLogits(asked))
        second = self.engine(batch, WithLogits(asked))
        others = only_terms(second)
        terms: dict[str, Any] = {
            name: Term((term.sum + others[name].sum) / 2, term.count)
            for name, term in only_terms(first).items()
        }
        found, again = logits_in(first), logits_in(second)
        for name, logits_NC in found.items():
            divergence = symmetric_divergence(logits_NC, again[name])
            terms[f"{name}_rdrop"] = Term(divergence, terms[name].count)
        if isinstance(objective, WithLogits):
            terms |= {f"logits/{name}": values for name, values in found.items()}
        return terms


def symmetric_divergence(first_NC: Tensor, second_NC: Tensor) -> Tensor:
    """Sum over rows of (KL(p || q) + KL(q || p)) / 2, computed in float32."""
    p = F.log_softmax(first_NC.float(), dim=-1)
    q = F.log_softmax(second_NC.float(), dim=-1)
    return ((p.exp() - q.exp()) * (p - q)).sum() / 2


@RULES.register("rdrop", options=RDropOptions)
def rdrop(options: RDropOptions) -> GradientRule:
    """The inner rule, on an engine that runs everything twice."""
    inner = build_rule(options.inner)

    def rule(learner: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward) -> None:
        names = [f"{name}_rdrop" for name in backward.weights]
        weights = [options.alpha * weight for weight in backward.weights.values()]
        counts = [backward.counts.get(name, 0) for name in backward.weights]
        extended = backward.extended(
            dict(zip(names, weights, strict=True)), dict(zip(names, counts, strict=True))
        )
        inner(Twice(learner), micro_batches, extended)

    return rule
