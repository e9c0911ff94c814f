"""Multiple choice: one score per candidate, a softmax over the candidates of each question.

    loss = - sum_n log softmax_c(score(question_n, candidate_nc))[right]

(Radford et al. 2018, section 3.3.) With a query and its candidates it is also a cross-encoder that
ranks (Nogueira & Cho 2019): every candidate is read together with the query.

Shapes: B rows, T tokens, S sequences (one per candidate), N items, C candidates, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tokenizer import Tokenizer
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.base import OwnOptions, Task
from nanolm.finetune.tasks.classify import HeadOptions, sequence_head
from nanolm.finetune.tasks.items import Item, text_problem
from nanolm.finetune.tasks.metrics import Metric, Report, higher
from nanolm.finetune.tasks.ragged import columns, ragged, within
from nanolm.model.heads import HeadRequest
from nanolm.objectives.base import Term, length_of
from nanolm.registry import OBJECTIVES

TIE = 1e-6
"""Probabilities that are no further apart are equal, but for float32's rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChooseOptions(HeadOptions):
    """The right one of several candidates."""

    name: str = "choose"


@OBJECTIVES.register("choose", options=ChooseOptions)
class Choose(Task):
    """Which candidate answers a question."""

    fields = ("question", "choices")
    term = "choose"
    has_counterfactual = True

    def __init__(self, options: OwnOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        self.heads = self.requests(options)

    def requests(self, options: OwnOptions) -> dict[str, HeadRequest]:
        """The heads that score candidates."""
        return {"choose": sequence_head(options, self.trunk, 1)}

    @classmethod
    def metrics(cls, options: ChooseOptions) -> tuple[Metric, ...]:
        """The loss, accuracy and the mean reciprocal rank."""
        return super().metrics(options) + higher("accuracy", "mrr")

    def check(self, record: Record, *, with_gold: bool) -> str | None:
        """A question, at least two candidates, and a label that names one of them."""
        problem = text_problem(record, ("question",))
        choices = record.get("choices")
        if problem:
            return problem
        if not isinstance(choices, (list, tuple)) or len(choices) < 2:
            return f"choices is {choices!r}, not a list of at least two texts"
        if not all(isinstance(text, str) and text.strip() for text in choices):
            return "choices holds an empty text"
        if with_gold and self.right(record) is None:
            return f"label {record.get('label')!r} names none of the {len(choices)} choices"
        return None

    def right(self, record: Record) -> int | None:
        """The index of the right candidate, from an index or from the candidate's text."""
        label: Any = record.get("label")
        choices = list(record["choices"])
        if isinstance(label, str) and label in choices:
            return choices.index(label)
        try:
            index = int(label)
            whole = index == float(label)
        except (TypeError, ValueError, OverflowError):  # infinity is no whole number
            return None
        return index if whole and 0 <= index < len(choices) else None

    def record_of(self, line: str) -> Record:
        """A question and its candidates, separated by tabs."""
        question, *choices = line.split("\t")
        return {"question": question, "choices": choices}

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """One item with a sequence per candidate."""
        question = self.encode(record["question"])
        framed = [self.frame(question, self.encode(text)) for text in record["choices"]]
        target = self.right(record) if with_gold else None
        return [Item(index, [s for s, _ in framed], target, sum(cut for _, cut in framed))]

    def counterfactual_target(self, item: Item) -> int | None:
        """The other one of two candidates."""
        return 1 - item.target if self.n_candidates(item) == 2 else None

    def n_candidates(self, item: Item) -> int:
        """A sequence each."""
        return len(item.sequences)

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Of each candidate its item and number, int64; choices int64[N], how many there are, and
        columns int64[C], the most; labels int64[N]."""
        sizes = np.array([self.n_candidates(item) for item in examples], dtype=np.int64)
        found = {
            "item": np.repeat(np.arange(len(sizes)), sizes),
            "choice": within(sizes),
            "choices": sizes,
            "columns": columns(sizes),
        }
        if examples[0].target is not None:
            found["labels"] = np.array([item.target for item in examples], dtype=np.int64)
        return found

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Questions."""
        return {"choose": len(batch["choices"])}

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The candidates' scores, [N, C], -inf where a question has fewer."""
        scores_S = heads["choose"](hidden_BTD, self.layout(batch))[:, 0]
        return {"choose": self.rectangle(scores_S, batch)}

    def rectangle(self, scores_A: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The scores of all candidates as [N, C], -inf where a question has fewer."""
        shape = (len(batch["choices"]), len(batch["columns"]))
        return ragged(scores_A, batch["item"], batch["choice"], shape)

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The cross-entropy over candidates, and accuracy."""
        logits_NC, labels_N = self.logits(hidden_BTD, heads, batch)["choose"], batch["labels"]
        count = length_of(labels_N)
        right = (logits_NC.argmax(dim=-1) == labels_N).float().sum()
        loss = F.cross_entropy(logits_NC, labels_N, reduction="sum")
        return {"choose": Term(loss, count), "accuracy": Term(right, count)}

    def answers(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> list[Any]:
        """The probability of each candidate."""
        logits_NC = self.logits(hidden_BTD, heads, batch)["choose"]
        probabilities = torch.softmax(logits_NC, dim=-1).tolist()
        return [p[:size] for p, size in zip(probabilities, batch["choices"].tolist(), strict=True)]

    def predictions(
        self, table: Table, items: list[Item], answers: list[Any]
    ) -> list[dict[str, Any]]:
        """The chosen index, its text, and all probabilities."""
        found = []
        for record, probabilities in zip(table.records, answers, strict=True):
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            text = record["choices"][best]
            found.append({"label": best, "choice": text, "probabilities": probabilities})
        return found

    def report(self, table: Table, predictions: list[dict[str, Any]]) -> Report:
        """Accuracy, and the mean reciprocal rank of the right candidate; another one that is as
        probable stands before it, so that a model that tells nothing apart is never right."""
        ranks = []
        for record, prediction in zip(table.records, predictions, strict=True):
            values, choices = prediction["probabilities"], record["choices"]
            right = self.right(record)
            others = [v for v, text in zip(values, choices) if text != choices[right]]
            ranks.append(1 + sum(value >= values[right] - TIE for value in others))
        figures = {"accuracy": float(np.mean([rank == 1 for rank in ranks]))}
        return Report(figures | {"mrr": metrics.ranking(ranks)["mrr"]})
