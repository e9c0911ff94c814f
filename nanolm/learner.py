"""Learner: trunk + heads + objective, the one module that DDP or FSDP2 wraps.

Its forward turns a batch into named (sum, count) terms, so everything that has parameters, the
vocabulary projection with its loss included, runs inside the wrapped module.

State-dict keys are `trunk.…` and `heads.<name>.…`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from nanolm.model.trunk import Trunk
from nanolm.objectives.base import Objective, Term

if TYPE_CHECKING:
    from nanolm.peft.base import Adapter


class Learner(nn.Module):
    """What is trained; the objective itself has no parameters."""

    def __init__(self, trunk: Trunk, heads: nn.ModuleDict, objective: Objective) -> None:
        super().__init__()
        self.trunk, self.heads, self.objective = trunk, heads, objective
        self.adapter: Adapter | None = None  # what a PEFT pass put in (nanolm/peft)

    def forward(
        self, batch: dict[str, Tensor], objective: Objective | None = None
    ) -> dict[str, Term]:
        """The objective's terms for one micro-batch; gradient rules may ask under another one."""
        objective = objective or self.objective
        hidden_BTD = self.trunk(objective.inputs(batch))
        return objective.loss(hidden_BTD, self.heads, batch)
