"""How keys of a published model and ours correspond: rules that are read in both directions.

A rule names one of our tensors and the published ones that it is made of: the same one, the same
one transposed (GPT-2's Conv1D), the one without rows that nothing reads (RoBERTa's positions), or
the rows of several, one below the other (queries, keys and values; gate and up). A `Table` has the
rules of one family, those of a layer once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig

Tensors = dict[str, Tensor]
Rows = Callable[[ModelConfig], list[int]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """`ours` is made of `theirs`; `{}` stands for the number of the layer."""

    theirs: tuple[str, ...]
    ours: str
    transposed: bool = False
    rows: Rows | None = None  # of each of theirs, where there are several
    unused: int = 0  # rows of theirs before the first that is ours; written as zeros

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor of the published ones."""
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.T if self.transposed else whole[self.unused :] if self.unused else whole

    def divide(self, whole: Tensor, model: ModelConfig) -> list[Tensor]:
        """The published tensors of ours."""
        whole = whole.T if self.transposed else whole
        if self.unused:
            whole = torch.cat([whole.new_zeros(self.unused, *whole.shape[1:]), whole])
        return [whole] if self.rows is None else list(whole.split(self.rows(model)))

    def at(self, layer: int) -> Rule:
        """The rule of one layer."""
        theirs = tuple(name.format(layer) for name in self.theirs)
        return dataclasses.replace(self, theirs=theirs, ours=self.ours.format(layer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The rules of one family: of the whole model, and of each of its layers."""

    whole: tuple[Rule, ...]
    layers: tuple[Rule, ...]

    def rules(self, model: ModelConfig) -> Iterator[Rule]:
        """All rules of a model with so many layers."""
        yield from self.whole
        for layer in range(model.n_layers):
            yield from (rule.at(layer) for rule in self.layers)

    def to_theirs(self, tensors: Mapping[str, Tensor], model: ModelConfig) -> Tensors:
        """Our tensors under the family's names and in its shapes; what we lack is left out."""
        named: Tensors = {}
        for rule in self.rules(model):
            if rule.ours in tensors:
                parts = rule.divide(tensors[rule.ours], model)
                named |= dict(zip(rule.theirs, parts, strict=True))
        return named

    def to_ours(self, tensors: Mapping[str, Tensor], model: ModelConfig) -> Tensors:
        """Published tensors under our names and in our shapes; what they lack is left out."""
        return {
            rule.ours: rule.join([tensors[name] for name in rule.theirs])
            for rule in self.rules(model)
            if rule.theirs[0] in tensors
        }


def same(theirs: str, ours: str, *, unused: int = 0) -> tuple[Rule, ...]:
    """One weight."""
    return (Rule((f"{theirs}.weight",), f"{ours}.weight", unused=unused),)


def pair(theirs: str, ours: str, *, transposed: bool = False) -> tuple[Rule, ...]:
    """Weight and bias of a linear layer or of a norm."""
    return (
        Rule((f"{theirs}.weight",), f"{ours}.weight", transposed),
        Rule((f"{theirs}.bias",), f"{ours}.bias"),
    )


def stacked(prefix: str, names: tuple[str, ...], ours: str, kind: str, rows: Rows) -> Rule:
    """Rows of several linear layers, one below the other."""
    return Rule(tuple(f"{prefix}.{name}.{kind}" for name in names), f"{ours}.{kind}", rows=rows)
