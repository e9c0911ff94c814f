"""What rules that wrap another rule share: their options, and the engines that they show to it.

    train: {rule: {name: fgm, epsilon: 0.5, inner: {name: rdrop, alpha: 1.0}}}

An outer rule calls its inner one with an engine and a backward of its own making: it may call it
several times for a micro-batch (adversarial passes), or give it an engine that computes more than
the task's terms (R-Drop, distillation). The gradient is exchanged between ranks in the last pass of
the step and in no other, whatever the nesting, because every earlier pass gets a `Muted` engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanolm.errors import UserError
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import ForwardObjective, Term
from nanolm.registry import Options
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import RuleEngine
from nanolm.training.gradient import PlainOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrapperOptions(Options):
    """What every rule that wraps another one has."""

    inner: Options = dataclasses.field(default_factory=PlainOptions)
    """The rule that is wrapped, with its own options; plain accumulation by default."""


class Wrapped:
    """A `RuleEngine` that hands everything on to another one; a rule changes what it needs to."""

    def __init__(self, engine: RuleEngine) -> None:
        self.engine = engine

    learner = property(lambda self: self.engine.learner, doc="What is trained.")
    world = property(lambda self: self.engine.world, doc="The ranks that train it.")
    sharded = property(lambda self: self.engine.sharded, doc="Whether ranks hold parts of it.")
    dtype = property(lambda self: self.engine.dtype, doc="Type of autocast products.")
    progress = property(lambda self: self.engine.progress, doc="What the rank is doing.")

    def __call__(self, batch: MicroBatch, objective: ForwardObjective | None = None) -> Any:
        """Terms of one micro-batch."""
        return self.engine(batch, objective)

    def local(self, batch: MicroBatch, objective: ForwardObjective | None = None) -> Any:
        """Terms of one micro-batch on this rank alone."""
        return self.engine.local(batch, objective)

    def move(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The batch's tensors on the device."""
        return self.engine.move(batch)

    def synchronised(self, when: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients cross ranks only in passes inside with `when` true."""
        return self.engine.synchronised(when)

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Inside, products are computed in the run's precision."""
        return self.engine.precision()


class Muted(Wrapped):
    """An engine whose passes are never the step's last: gradients stay on this rank."""

    def synchronised(self, when: bool) -> contextlib.AbstractContextManager[None]:
        """Never exchanges gradients."""
        return self.engine.synchronised(when=False)


def one_by_one(
    engine: RuleEngine, micro_batches: Sequence[MicroBatch]
) -> Iterator[tuple[RuleEngine, MicroBatch]]:
    """(engine, micro-batch) pairs; only the last engine exchanges gradients."""
    last = len(micro_batches) - 1
    for number, batch in enumerate(micro_batches):
        yield (engine if number == last else Muted(engine)), batch


class ChoiceObjective(ForwardObjective, Protocol):
    """An objective, or what stands in for one, some of whose terms are choices among classes."""

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Objective.logits`."""


class AroundObjective:
    """Stands in for an objective: reads what it reads, and a rule's own class says what is lost."""

    def __init__(self, objective: Any) -> None:
        self.objective: ChoiceObjective = objective

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """What the trunk reads."""
        return self.objective.inputs(batch)

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The objective's own, for rules around this one."""
        return self.objective.logits(hidden_BTD, heads, batch)


class WithLogits(AroundObjective):
    """An objective whose loss also returns the logits [N, C] of each term that is a choice among
    classes, as `logits/<term>`; N is the term's count of targets."""

    def __init__(self, objective: Any) -> None:
        if not hasattr(objective, "logits"):
            raise UserError(
                f"train.rule compares class probabilities, and objective="
                f"{objective.options.name} has none; use another train.rule"
            )
        super().__init__(objective)

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The terms, and the logits beside them, with the same dropout in the heads."""
        on_cuda = hidden_BTD.device.type == "cuda"
        with torch.random.fork_rng(devices=[hidden_BTD.device] if on_cuda else []):
            logits = self.objective.logits(hidden_BTD, heads, batch)
        terms = self.objective.loss(hidden_BTD, heads, batch)
        return terms | {f"logits/{name}": values for name, values in logits.items()}


def logits_in(terms: Mapping[str, Any]) -> dict[str, Tensor]:
    """{term: logits} that `WithLogits` put among the terms."""
    prefix = "logits/"
    return {k.removeprefix(prefix): v for k, v in terms.items() if k.startswith(prefix)}


def only_terms(terms: Mapping[str, Any]) -> dict[str, Term]:
    """The terms without logits."""
    return {name: term for name, term in terms.items() if not name.startswith("logits/")}
