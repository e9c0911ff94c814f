"""Learner: trunk + heads + objective, the one module that DDP or FSDP2 wraps.

Its forward turns a batch into named (sum, count) terms, so everything that has parameters, the
vocabulary projection with its loss included, runs inside the wrapped module.

State-dict keys are `trunk.…` and `heads.<name>.…`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanolm.model.trunk import Trunk
from nanolm.objectives.base import ForwardObjective, Objective
from nanolm.registry import Options

Watch = Callable[[Sequence[torch.optim.Optimizer], int], None]
"""Called with the run's optimizers and number of steps, by methods that act between steps."""


class Adapter:
    """What a pass did to a learner: small weights by name, and how to take them out again."""

    def __init__(
        self, options: Options, heads: Iterable[str], base: str | None, base_hash: str
    ) -> None:
        self.options, self.heads = options, tuple(heads)
        self.base, self.base_hash = base, base_hash
        self.names: tuple[str, ...] = ()
        self.replaced: list[tuple[Any, str, Any]] = []
        self.added: list[tuple[nn.Module, str]] = []
        self.undo: list[Callable[[], object]] = []
        self.watch: Watch = lambda optimizers, steps: None

    def replace(self, parent: Any, name: str, other: Any) -> None:
        """Puts something else where the parent's module or function of this name stands."""
        self.replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, other)

    def add(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Gives the parent one more child."""
        parent.add_module(name, module)
        self.added.append((parent, name))

    def train(self, parameters: Iterable[nn.Parameter]) -> None:
        """Trains weights of the base or of a head; their present values come back on detaching."""
        for parameter in parameters:
            before = parameter.detach().clone()
            parameter.requires_grad_(True)
            self.undo.append(functools.partial(put_back, parameter, before))

    def tensors(self, learner: nn.Module) -> dict[str, Tensor]:
        """The small weights (the live tensors) by name: all of the model that is saved."""
        named = dict(learner.named_parameters()) | dict(learner.named_buffers())
        return {name: named[name].detach() for name in self.names}


def put_back(parameter: nn.Parameter, value: Tensor) -> None:
    """Gives the parameter this value again."""
    parameter.detach().copy_(value)


class Learner(nn.Module):
    """What is trained; the objective itself has no parameters."""

    def __init__(self, trunk: Trunk, heads: nn.ModuleDict, objective: Objective) -> None:
        super().__init__()
        self.trunk, self.heads, self.objective = trunk, heads, objective
        self.adapter: Adapter | None = None  # what a PEFT pass put in (nanolm/peft)

    def forward(self, batch: dict[str, Tensor], objective: ForwardObjective | None = None) -> Any:
        """The objective's terms for one micro-batch; gradient rules and evaluations may ask under
        another one, and get what its `loss` returns."""
        asked: ForwardObjective = objective or self.objective
        # The loss is inside the wrapped module: DDP sees every parameter in use, and FSDP frees the
        # vocabulary's weight only after the head has read it.
        hidden_BTD = self.trunk(asked.inputs(batch))
        return asked.loss(hidden_BTD, self.heads, batch)
