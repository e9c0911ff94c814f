"""Regression: one or several scores for a text or a pair.

    loss = sum_n mean_c (z_nc - (y_nc - m_c) / s_c)^2

with the mean m and standard deviation s of the training scores, which are stored with the model:
the head starts at the mean, whatever the scale of the scores.

Shapes: B rows, T tokens, S sequences (one per item), C scores, D model width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tables.numbers import LARGEST, number
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError, require
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.classify import Pooled, PooledOptions, sequence_head
from nanolm.finetune.tasks.items import Item
from nanolm.finetune.tasks.metrics import Metric, Report
from nanolm.objectives.base import Term, length_of
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressOptions(PooledOptions):
    """Scores for a text or a pair."""

    name: str = "regress"
    scores: list[str] = dataclasses.field(default_factory=lambda: ["score"])
    """Columns that hold the scores."""
    mean: list[float] | None = None
    """Mean of each score; null: taken from the train split."""
    std: list[float] | None = None
    """Standard deviation of each score; null: taken from the train split."""


@OBJECTIVES.register("regress", options=RegressOptions)
class Regress(Pooled):
    """How much of something a text has."""

    options: RegressOptions
    gold: tuple[str, ...] = ("score",)
    metric = "pearson"
    term = "regress"

    def __init__(self, options: RegressOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        require(options.mean is not None, "objective=regress has no mean: it comes from train")
        self.gold = tuple(options.scores)
        self.heads = {"regress": sequence_head(options, self.trunk, len(options.scores))}

    @classmethod
    def gold_fields(cls, options: RegressOptions) -> tuple[str, ...]:
        """The columns of the scores."""
        return tuple(options.scores)

    @classmethod
    def resolve(cls, options: RegressOptions, table: Table) -> RegressOptions:
        """Mean and standard deviation from the training records."""
        options = super().resolve(options, table)
        rows = [[number(r.get(name)) for name in options.scores] for r in table.records]
        usable = np.array([row for row in rows if None not in row], dtype=np.float64)
        if not len(usable):
            raise UserError(f"{table.path} has no row with numbers in {', '.join(options.scores)}")
        mean, std = usable.mean(axis=0), spread(usable)
        return dataclasses.replace(
            options,
            mean=options.mean or [rounded(float(m), float(s)) for m, s in zip(mean, std)],
            std=options.std or [rounded(float(s), float(s)) or 1.0 for s in std],
        )

    @classmethod
    def metrics(cls, options: RegressOptions) -> tuple[Metric, ...]:
        """The loss, errors and correlations."""
        return super().metrics(options) + metrics.REGRESSION

    def offered(self, table: Table) -> list[str]:
        """Correlations only where a score differs: with a constant there is none."""
        differs = any(
            len({number(record.get(name)) for record in table.records}) > 1 for name in self.gold
        )
        names = super().offered(table)
        return [name for name in names if differs or name not in ("pearson", "spearman")]

    def check_gold(self, record: Record) -> str | None:
        """Scores must be numbers."""
        for name in self.gold:
            if number(record.get(name)) is None:
                return f"{name} is {record.get(name)!r}, not a number (of at most {LARGEST:g})"
        return None

    def gold_of(self, record: Record) -> np.ndarray:
        """The standardised scores, float32[C]."""
        scores_C = np.array([number(record[name]) for name in self.gold])
        mean_C, std_C = np.array(self.options.mean), np.array(self.options.std)
        return ((scores_C - mean_C) / std_C).astype(np.float32)

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """labels: float32 [S, C]."""
        if examples[0].target is None:
            return {}
        return {"labels": np.stack([item.target for item in examples])}

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The squared error of standardised scores."""
        scores_SC = heads["regress"](hidden_BTD, self.layout(batch))
        error_S = (scores_SC - batch["labels"]).square().mean(dim=-1)
        return {"regress": Term(error_S.sum(), length_of(error_S))}

    def answers(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> list[Any]:
        """The scores, in their own units."""
        scores_SC = heads["regress"](hidden_BTD, self.layout(batch))
        mean, std = np.array(self.options.mean), np.array(self.options.std)
        # In float64: beside a mean of 1e7, float32 has no place for a deviation below 1.
        return (np.array(scores_SC.tolist()) * std + mean).tolist()

    def predictions(
        self, table: Table, items: list[Item], answers: list[Any]
    ) -> list[dict[str, Any]]:
        """Each score by its column's name."""
        return [dict(zip(self.gold, values)) for values in answers]

    def report(self, table: Table, predictions: list[dict[str, Any]]) -> Report:
        """Errors and correlations."""
        gold = [[number(record[name]) for name in self.gold] for record in table.records]
        predicted = [[prediction[name] for name in self.gold] for prediction in predictions]
        return metrics.regression(np.array(gold, dtype=np.float64), np.array(predicted))


def spread(values_NC: np.ndarray) -> np.ndarray:
    """The standard deviations [C], of a scale whose squares float64 does not hold, too: they are
    taken of numbers near 1, which a power of two makes of them to the bit."""
    _, powers_C = np.frexp(np.abs(values_NC).max(axis=0))
    return np.ldexp(np.ldexp(values_NC, -powers_C).std(axis=0), powers_C)


def rounded(value: float, scale: float) -> float:
    """Six decimals, and of a small scale as many more as it has zeros behind the point."""
    zeros = max(0, -math.floor(math.log10(scale))) if scale > 0 else 0
    return round(value, 6 + (zeros if zeros > 2 else 0))
