"""Knowledge distillation: learn from labels and a teacher's probabilities (Hinton et al. 2015).

    L = (1 - w) L_task + w T^2 KL(p_teacher || p_student)        p = softmax(logits / T), section 2

The teacher is a checkpoint with the same tokenizer and heads, of any size; it reads the same batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolm.errors import UserError, require
from nanolm.learner import Learner
from nanolm.objectives.base import ForwardObjective, Term
from nanolm.registry import RULES
from nanolm.rules.base import (
    ChoiceObjective,
    WithLogits,
    Wrapped,
    WrapperOptions,
    logits_in,
    only_terms,
)
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import RuleEngine
from nanolm.training.gradient import Backward, GradientRule, build_rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptions(WrapperOptions):
    """Learning from a teacher checkpoint."""

    name: str = "distill"
    teacher: str | None = None
    """Run or checkpoint to learn from; hf:FOLDER takes a published one (see `nanolm import`)."""
    temperature: float = 2.0
    """T: divides the logits of both."""
    weight: float = 0.5
    """Share w of the teacher in the loss; the rest is the labels'."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"train.rule.temperature={self.temperature} must be > 0")
        require(0 <= self.weight <= 1, f"train.rule.weight={self.weight} must lie in [0, 1]")


class Taught(Wrapped):
    """An engine that puts `<term>_distill` beside each term that has logits."""

    def __init__(self, engine: RuleEngine, teacher: Learner, temperature: float) -> None:
        super().__init__(engine)
        self.teacher, self.temperature = teacher, temperature

    def __call__(self, batch: MicroBatch, objective: ForwardObjective | None = None) -> Any:
        """Terms of one micro-batch, and if asked for the student's logits."""
        asked = objective or self.engine.learner.objective
        terms = dict(self.engine(batch, WithLogits(asked)))
        taught = self.taught(batch, cast(ChoiceObjective, asked))  # WithLogits has asked it
        for name, logits_NC in logits_in(terms).items():
            divergence = divergence_from(taught[name], logits_NC, self.temperature)
            terms[f"{name}_distill"] = Term(divergence, terms[name].count)
        return terms if isinstance(objective, WithLogits) else only_terms(terms)

    @torch.no_grad()
    def taught(self, batch: MicroBatch, objective: ChoiceObjective) -> dict[str, Tensor]:
        """The teacher's logits of the same targets."""
        tensors = self.engine.move(batch)
        with self.engine.precision():
            hidden_BTD = self.teacher.trunk(objective.inputs(tensors))
            return objective.logits(hidden_BTD, self.teacher.heads, tensors)


def divergence_from(taught_NC: Tensor, logits_NC: Tensor, temperature: float) -> Tensor:
    """T^2 times the sum over rows of KL(softmax(taught / T) || softmax(logits / T)), in float32."""
    require(
        taught_NC.shape == logits_NC.shape,
        f"train.rule.teacher chooses among {taught_NC.shape[-1]} classes and this model among "
        f"{logits_NC.shape[-1]}; take a teacher of the same task and tokenizer",
    )
    p = F.log_softmax(taught_NC.float() / temperature, dim=-1)
    q = F.log_softmax(logits_NC.float() / temperature, dim=-1)
    return F.kl_div(q, p, reduction="sum", log_target=True) * temperature**2


def open_teacher(path: str, engine: RuleEngine) -> Learner:
    """The checkpoint in evaluation mode; raises UserError when it cannot teach this learner."""
    from nanolm.hub.importing import base_of  # noqa: PLC0415  (as below)
    from nanolm.saved import open_saved  # noqa: PLC0415  (it imports what registers this rule)

    folder = base_of(path, print if engine.world.is_main else lambda line: None)
    saved = open_saved(str(folder), phase="train", device=str(engine.world.device))
    student = engine.learner.objective
    missing = sorted(set(student.heads) - set(saved.learner.heads))
    require(
        not missing,
        f"train.rule.teacher={path} has no head {', '.join(missing)}, which this run trains; take "
        f"a teacher of the same task",
    )
    tokenizer = getattr(student, "tokenizer", None)
    require(
        tokenizer is None or tokenizer.hash == saved.tokenizer.hash,
        f"train.rule.teacher={path} has another tokenizer than this run; take one that shares it",
    )
    dtype = engine.learner.trunk.embedding.weight.dtype
    return saved.learner.to(dtype).requires_grad_(False)


@RULES.register("distill", options=DistillOptions)
def distill(options: DistillOptions) -> GradientRule:
    """The inner rule, on an engine with a teacher; the teacher is opened before the first step."""
    path = options.teacher
    if path is None:
        raise UserError(
            "train.rule=distill needs a teacher: set train.rule.teacher to a run or checkpoint"
        )
    inner = build_rule(options.inner)
    teachers: list[Learner] = []

    def rule(learner: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward) -> None:
        if not teachers:
            teachers.append(open_teacher(path, learner))
        names = list(backward.weights)
        weights = {f"{n}_distill": options.weight * backward.weights[n] for n in names}
        counts = {f"{n}_distill": backward.counts.get(n, 0) for n in names}
        shared = backward.weighed(1 - options.weight, logged=True).extended(weights, counts)
        inner(Taught(learner, teachers[0], options.temperature), micro_batches, shared)

    return rule
