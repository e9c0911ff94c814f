"""Several runs of one task as one model: their logits averaged, or their weights.

    logits     every member reads the batch; heads' outputs are averaged       k times the work
    weights    one model in the middle of the members                         as fast as one

Averaged weights (Wortsman et al. 2022, "Model soups") only mean something for runs that started
from the same pretrained weights; averaged logits for any runs of the same task.

Shapes: B rows, T tokens, D model width, k members.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.errors import require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.tasks.base import as_objective, task_in
from nanolm.learner import Learner
from nanolm.model.trunk import Inputs, Trunk
from nanolm.ops.contract import Phase
from nanolm.saved import Saved, open_saved

Average = Literal["logits", "weights"]


class SideBySide(nn.ModuleList):
    """Several trunks, whose hidden states lie beside each other."""

    def forward(self, inputs: Inputs) -> Tensor:
        """[B, T, k D]."""
        return torch.cat([trunk(inputs) for trunk in self], dim=-1)


class MeanHead(nn.ModuleList):
    """Several heads, each on the hidden states of its own trunk."""

    def forward(self, hidden: Tensor, *where: Any) -> Tensor:
        """The mean of what the heads give for [..., k D]."""
        parts = hidden.chunk(len(self), dim=-1)
        return torch.stack([head(part, *where) for head, part in zip(self, parts)]).mean(dim=0)


def open_together(
    run: str,
    others: Sequence[str] = (),
    average: Average = "logits",
    *,
    phase: Phase = "prefill",
    plugins: list[str] | None = None,
    ema: bool = True,
) -> Saved:
    """The model in `run`, or its average with those in `others`.

    Raises UserError when they are not runs of the same task, model and tokenizer.
    """
    members = [open_saved(p, phase=phase, plugins=plugins, ema=ema) for p in (run, *others)]
    first = members[0]
    for path, member in zip(others, members[1:], strict=True):
        require_alike(run, first, path, member)
    if not others:
        return first
    learner = of_logits(members) if average == "logits" else of_weights(members)
    return dataclasses.replace(
        first, folder=pathlib.Path(run), learner=learner, members=len(members)
    )


def require_alike(run: str, first: Saved, path: str, member: Saved) -> None:
    """Raises UserError naming what a member has otherwise than the first."""
    for saved, place in ((first, run), (member, path)):
        require(
            isinstance(saved.config, TaskConfig),
            f"ensemble: {place} was pretrained, not fine-tuned; only runs of one task are averaged",
        )
    mine, its = first.config, member.config
    differences = {
        "objective": mine.objective != its.objective,
        "model": mine.model != its.model,
        "data.row_length": mine.data.row_length != its.data.row_length,
        "tokenizer": first.tokenizer.hash != member.tokenizer.hash,
    }
    other = [name for name, differs in differences.items() if differs]
    require(
        not other,
        f"ensemble: {path} differs from {run} in {', '.join(other)}; average runs that differ in "
        f"seed, fold or method only",
    )


def of_logits(members: Sequence[Saved]) -> Learner:
    """One learner that asks all; raises UserError for a task that writes."""
    learners = [member.learner for member in members]
    task = task_in(learners[0])
    require(
        not task.generates,
        f"ensemble: objective={members[0].config.objective.name} writes token by token; average "
        f"the weights instead: --average weights",
    )
    heads = {name: MeanHead(each.heads[name] for each in learners) for name in learners[0].heads}
    trunk = SideBySide(each.trunk for each in learners)
    # Evaluation and prediction only call the trunk.
    return Learner(cast(Trunk, trunk), nn.ModuleDict(heads), as_objective(task)).eval()


def of_weights(members: Sequence[Saved]) -> Learner:
    """The first learner with the mean of all weights; raises UserError when that means nothing."""
    configs = [cast(TaskConfig, member.config) for member in members]  # see `require_alike`
    bases = {(config.init_from, config.weights) for config in configs}
    require(
        len(bases) == 1 and configs[0].weights == "saved",
        "ensemble: --average weights needs runs that started from the same pretrained weights; "
        "use --average logits",
    )
    require(
        all(config.peft.name == "none" for config in configs),
        "ensemble: --average weights cannot average adapters; fold them into their bases first "
        "(`nanolm merge`), or use --average logits",
    )
    named = [learner_tensors(member.learner) for member in members]
    with torch.no_grad():
        for name, tensor in named[0].items():
            tensor.copy_(torch.stack([each[name].double() for each in named]).mean(dim=0))
    return members[0].learner
