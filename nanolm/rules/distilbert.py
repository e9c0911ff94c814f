"""Distillation in pretraining, as DistilBERT was made (Sanh et al. 2019, sections 2 and 3).

    L = a T^2 KL(p_teacher || p_student) + b L_task + c (1 - cos(h_student, h_teacher))

p = softmax(logits / T) over the vocabulary, h the last hidden state; both are means over all tokens
of the rows, hidden or not, and training rows of `mlm` are full. The paper gives no weights: a = 5,
b = 2, c = 1 and T = 2 are those of the authors' code. The teacher reads the same corrupted rows, in
evaluation mode, and is in no checkpoint of the student: a run that is resumed opens it again.

Shapes: B rows, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.ranges import Within
from nanolm.errors import UserError, require
from nanolm.learner import Learner
from nanolm.objectives.base import ForwardObjective, Term, length_of
from nanolm.registry import RULES
from nanolm.rules.base import AroundObjective, Wrapped, WrapperOptions
from nanolm.rules.distill import open_teacher
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import RuleEngine
from nanolm.training.gradient import Backward, GradientRule, build_rule

SOFT, COSINE = "soft_targets", "cosine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertOptions(WrapperOptions):
    """Pretraining with a teacher: its probabilities, the task, its hidden states."""

    name: str = "distilbert"
    teacher: str | None = None
    """Run or checkpoint to learn from; hf:FOLDER takes a published one (see `nanolm import`)."""
    temperature: float = 2.0
    """T: divides the logits of both."""
    soft_weight: Annotated[float, Within(0)] = 5.0
    """Weight a of the teacher's probabilities."""
    task_weight: Annotated[float, Within(0)] = 2.0
    """Weight b of the objective's own loss."""
    cosine_weight: Annotated[float, Within(0)] = 1.0
    """Weight c of the direction of the last hidden states; 0 lets the teacher be of another width.
    """

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"train.rule.temperature={self.temperature} must be > 0")
        weights = (self.soft_weight, self.task_weight, self.cosine_weight)
        require(min(weights) >= 0, f"train.rule weights {weights} must not be negative")


class BesideTeacher(AroundObjective):
    """An objective whose loss also has the terms `soft_targets` and `cosine`."""

    def __init__(self, objective: Any, teacher: Learner, options: DistilBertOptions) -> None:
        super().__init__(objective)
        self.teacher, self.options = teacher, options

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The objective's terms and two more."""
        terms = self.objective.loss(hidden_BTD, heads, batch)
        with torch.no_grad():
            taught_BTD = self.teacher.trunk(self.inputs(batch))
            taught_BTV = self.teacher.heads["lm"](taught_BTD)
        count = length_of(batch["tokens"].flatten())
        soft_BT = divergences(taught_BTV, heads["lm"](hidden_BTD), self.options.temperature)
        terms |= {SOFT: Term(soft_BT.sum(), count)}
        if self.options.cosine_weight > 0:
            terms |= {COSINE: Term(distances(taught_BTD, hidden_BTD).sum(), count)}
        return terms


def tokens_of(micro_batches: Sequence[MicroBatch]) -> int:
    """Tokens of a rank's rows; raises UserError for rows that are not full.

    Known on the host: to look for padding would make it wait for the device.
    """
    require(
        not any("lengths" in batch.tensors for batch in micro_batches),
        "train.rule=distilbert takes means over all tokens of full rows, and this objective's rows "
        "are filled up; use --train.rule.name distill",
    )
    return sum(batch.tensors["tokens"].numel() for batch in micro_batches if len(batch.row_ids))


def divergences(taught_BTV: Tensor, logits_BTV: Tensor, temperature: float) -> Tensor:
    """[B, T]: T^2 KL(softmax(taught / T) || softmax(logits / T)) of every token, in float32."""
    require(
        taught_BTV.shape == logits_BTV.shape,
        f"train.rule.teacher has a vocabulary of {taught_BTV.shape[-1]} and this model one of "
        f"{logits_BTV.shape[-1]}; set model.vocab_size={taught_BTV.shape[-1]}",
    )
    p = F.log_softmax(taught_BTV.float() / temperature, dim=-1)
    q = F.log_softmax(logits_BTV.float() / temperature, dim=-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2


def distances(taught_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
    """[B, T]: one minus the cosine of the angle between two hidden states, in float32."""
    return 1 - F.cosine_similarity(taught_BTD.float(), hidden_BTD.float(), dim=-1)


class Distilled(Wrapped):
    """An engine that asks every objective beside the teacher."""

    def __init__(self, engine: RuleEngine, teacher: Learner, options: DistilBertOptions) -> None:
        super().__init__(engine)
        self.teacher, self.options = teacher, options

    def __call__(self, batch: MicroBatch, objective: ForwardObjective | None = None) -> Any:
        """Terms of one micro-batch, through the distributed wrapper."""
        asked = objective or self.engine.learner.objective
        return self.engine(batch, BesideTeacher(asked, self.teacher, self.options))


def require_fitting(engine: RuleEngine, teacher: Learner, options: DistilBertOptions) -> None:
    """Raises UserError when this run predicts anything but masked words, or the widths differ."""
    learner = engine.learner
    objective = learner.objective
    require(
        list(objective.weights) == ["mlm"] and "lm" in objective.heads,
        f"train.rule=distilbert is for masked words alone (objective.name=mlm), and this run "
        f"minimises {', '.join(objective.weights)}; use --train.rule.name distill",
    )
    theirs, ours = (one.trunk.embedding.weight.shape[1] for one in (teacher, learner))
    require(
        theirs == ours or options.cosine_weight == 0,
        f"train.rule.teacher={options.teacher} is {theirs} wide and this model {ours}, and hidden "
        f"states of two widths have no angle; set train.rule.cosine_weight=0",
    )


@RULES.register("distilbert", options=DistilBertOptions)
def distilbert(options: DistilBertOptions) -> GradientRule:
    """The inner rule, on an engine with a teacher; the teacher is opened before the first step."""
    path = options.teacher
    if path is None:
        raise UserError(
            "train.rule=distilbert needs a teacher: set train.rule.teacher to a run or checkpoint"
        )
    inner = build_rule(options.inner)
    teachers: list[Learner] = []

    def rule(learner: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward) -> None:
        if not teachers:
            teacher = open_teacher(path, learner)
            require_fitting(learner, teacher, options)
            teachers.append(teacher)
        (count,) = learner.world.all_sum([tokens_of(micro_batches)])
        # A rule around this one may have weighed the objective's terms: these two go along.
        outer = backward.weights["mlm"] / learner.learner.objective.weights["mlm"]
        weights = {SOFT: outer * options.soft_weight, COSINE: outer * options.cosine_weight}
        shared = backward.weighed(options.task_weight, logged=True)
        shared = shared.extended(weights, dict.fromkeys(weights, count))
        inner(Distilled(learner, teachers[0], options), micro_batches, shared)

    return rule
