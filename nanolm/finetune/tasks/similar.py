"""Similarity: how alike two texts are, as the cosine of their vectors, from labelled pairs.

    target = (score - low) / (high - low)       loss = (cos(a, b) - target)^2

Both texts are read apart by the same trunk (Reimers & Gurevych 2019, section 3, regression
objective), so a text's vector can be kept; `regress` reads a pair together and is more exact. The
head is that of `embed`: a run of one can go on from a run of the other.

Shapes: B rows, T tokens, S sequences (two to a pair), N pairs, D width of a vector.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tables.numbers import LARGEST, number
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError, require
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.base import Task
from nanolm.finetune.tasks.embed import VectorOptions, vector_head
from nanolm.finetune.tasks.items import Item, text_problem
from nanolm.finetune.tasks.metrics import Metric, Report, higher
from nanolm.objectives.base import Term, length_of
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimilarOptions(VectorOptions):
    """How alike two texts are."""

    name: str = "similar"
    low: float | None = None
    """Score of texts whose vectors are to be at right angles; null: the least of train."""
    high: float | None = None
    """Score of texts whose vectors are to be equal; null: the greatest of train."""

    def __post_init__(self) -> None:
        low, high = self.low, self.high
        require(
            low is None or high is None or low < high,
            f"objective.low={low} must be below objective.high={high}",
        )


@OBJECTIVES.register("similar", options=SimilarOptions)
class Similar(Task):
    """How alike two texts are, by the nearness of their vectors."""

    options: SimilarOptions
    fields = ("text", "text_pair")
    gold = ("score",)
    metric = "spearman"
    term = "similar"

    def __init__(self, options: SimilarOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        require(
            options.low is not None and options.high is not None,
            "objective=similar has no scale: low and high come from train",
        )
        self.heads = {"embed": vector_head(options, self.trunk)}

    @classmethod
    def resolve(cls, options: SimilarOptions, table: Table) -> SimilarOptions:
        """The scale of the scores from the training records."""
        scores = [s for r in table.records if (s := number(r.get("score"))) is not None]
        if not scores or min(scores) == max(scores):
            raise UserError(f"{table.path} has no two different numbers in score to learn from")
        low = min(scores) if options.low is None else options.low
        high = max(scores) if options.high is None else options.high
        return dataclasses.replace(options, low=low, high=high)

    @classmethod
    def metrics(cls, options: SimilarOptions) -> tuple[Metric, ...]:
        """The loss and the correlations."""
        return super().metrics(options) + higher("pearson", "spearman")

    def offered(self, table: Table) -> list[str]:
        """Correlations only where the score differs: with a constant there is none."""
        differs = len({number(record.get("score")) for record in table.records}) > 1
        names = super().offered(table)
        return [name for name in names if differs or name not in ("pearson", "spearman")]

    def check(self, record: Record, *, with_gold: bool) -> str | None:
        """Two texts, and a number."""
        problem = text_problem(record, self.fields)
        if problem is None and with_gold and number(record.get("score")) is None:
            return f"score is {record.get('score')!r}, not a number (of at most {LARGEST:g})"
        return problem

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """One item: both texts, and the scaled score."""
        framed = [self.frame(self.encode(record[field])) for field in self.fields]
        target = None
        if with_gold:
            low, high = cast(float, self.options.low), cast(float, self.options.high)
            score = cast(float, number(record["score"]))
            target = np.float32((score - low) / (high - low))
        return [Item(index, [s for s, _ in framed], target, sum(cut for _, cut in framed))]

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """labels: float32 [N]."""
        if examples[0].target is None:
            return {}
        return {"labels": np.array([item.target for item in examples], dtype=np.float32)}

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Pairs."""
        return {"similar": len(batch["labels"])}

    def cosines(self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]) -> Tensor:
        """float32 [N]: the cosine of each pair."""
        pairs_N2D = heads["embed"](hidden_BTD, self.layout(batch)).unflatten(0, (-1, 2))
        return (pairs_N2D[:, 0] * pairs_N2D[:, 1]).sum(dim=-1)

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The squared error of the cosine."""
        error_N = (self.cosines(hidden_BTD, heads, batch) - batch["labels"]).square()
        return {"similar": Term(error_N.sum(), length_of(error_N))}

    def answers(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> list[Any]:
        """The cosine of each pair."""
        return self.cosines(hidden_BTD, heads, batch).tolist()

    def predictions(
        self, table: Table, items: list[Item], answers: list[Any]
    ) -> list[dict[str, Any]]:
        """similarity, the cosine in [-1, 1]."""
        return [{"similarity": cosine} for cosine in answers]

    def report(self, table: Table, predictions: list[dict[str, Any]]) -> Report:
        """Correlations of cosine and score; errors would depend on the scale."""
        gold = np.array([[number(record["score"])] for record in table.records])
        found = np.array([[prediction["similarity"]] for prediction in predictions])
        figures = metrics.regression(gold, found).figures
        return Report({name: figures[name] for name in ("pearson", "spearman")})
