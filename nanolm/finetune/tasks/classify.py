"""Classification of one text or a pair (Devlin et al. 2019, section 4.1).

    loss = - sum_n w(y_n) log softmax(z_n)[y_n]           one label a text
    loss = - sum_n mean_c [y log s(z) + (1 - y) log(1 - s(z))]     several (multi_label)

Shapes: B rows, T tokens, S sequences (one per item), C classes, D model width.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tables.labels import class_weights, infer_labels, label_problem, label_text
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.base import OwnOptions, PairOptions, Task, chosen
from nanolm.finetune.tasks.heads import (
    POOLED_HEADS,
    Activation,
    PooledHead,
    Pooling,
    pooling_of,
)
from nanolm.finetune.tasks.items import Item, text_problem
from nanolm.finetune.tasks.metrics import Metric, Report
from nanolm.model.heads import HeadRequest
from nanolm.objectives.base import Term, length_of
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOptions(PairOptions):
    """Options of tasks with a head on pooled states."""

    pooling: Pooling = "auto"
    """auto: mean for an encoder, last for a decoder and for two streams; or cls, mean, last."""
    head: PooledHead = "layer"
    """layer: a layer and its activation stand before the decision, as in BERT; linear: nothing, and
    the decision has no bias, as in published decoders; transform: what BERT has before its
    vocabulary, as in ModernBERT."""
    activation: Activation = "tanh"
    """Of head=layer: tanh, or relu as DistilBERT's heads in transformers have."""
    head_dropout: float = 0.1
    """Dropout before the head's last layer."""

    def __post_init__(self) -> None:
        value = self.head_dropout
        require(0 <= value < 1, f"objective.head_dropout={value} must lie in [0, 1)")
        require(
            self.head == "layer" or self.activation == "tanh",
            f"objective.activation={self.activation} is that of objective.head=layer, and "
            f"objective.head={self.head} has no such layer; leave one of them out",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledOptions(HeadOptions):
    """Options of tasks that decide about a text or a pair."""

    pair: bool | None = None
    """Read text and text_pair; null: when the train split has a column text_pair, and of a model
    that was not trained here (`nanolm import`) when the record has one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyOptions(PooledOptions):
    """One label, or several, for a text or a pair."""

    name: str = "classify"
    multi_label: bool = False
    """A record's label is a list, and each class is decided by itself."""
    labels: list[str] | None = None
    """The label set; null: inferred from the train split, in order, and stored with the model."""
    label_smoothing: float = 0.0
    """Share of the target distribution spread evenly over the classes."""
    class_weights: Literal["balanced"] | list[float] | None = None
    """Weight of each class in the loss; balanced: inversely proportional to its frequency."""

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothing, weights = self.label_smoothing, self.class_weights
        require(0 <= smoothing < 1, f"objective.label_smoothing={smoothing} must lie in [0, 1)")
        require(
            not (self.multi_label and (smoothing or weights)),
            "objective.multi_label decides each class by itself: label_smoothing and class_weights "
            "do not apply",
        )


def sequence_head(options: HeadOptions, trunk: str, n_classes: int) -> HeadRequest:
    """The request for a head on pooled states."""
    facts: dict[str, Any] = {
        "n_classes": n_classes,
        "pooling": pooling_of(options.pooling, trunk),
        "dropout": options.head_dropout,
    }
    if options.head == "layer":
        facts["activation"] = options.activation
    return HeadRequest(POOLED_HEADS[options.head], facts)


class Pooled(Task):
    """Base of tasks with one framed text, or pair, per record and a head on its pooled state."""

    options: PooledOptions
    split_by = ("text", "text_pair")

    def __init__(self, options: OwnOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        self.fields = self.split_by if options.pair else ("text",)
        require(
            options.pair or not options.mark_shared,
            "objective.mark_shared compares two texts, and these records have one: leave it out, "
            "or name the second with data.columns: {text_pair: COLUMN}",
        )

    @classmethod
    def resolve(cls, options: OwnOptions, table: Table) -> Any:
        """Whether records are pairs, from the training records."""
        pair = options.pair
        return dataclasses.replace(
            options, pair="text_pair" in table.columns if pair is None else pair
        )

    def check(self, record: Record, *, with_gold: bool) -> str | None:
        """Texts must be there and not empty; what else, `check_gold` says."""
        return (
            text_problem(record, self.fields_of(record))
            or (with_gold and self.check_gold(record))
            or None
        )

    def fields_of(self, record: Record) -> tuple[str, ...]:
        """The texts that are read of a record."""
        if self.options.pair is None and record.get("text_pair") is not None:
            return self.split_by
        return self.fields

    def record_of(self, line: str) -> Record:
        """One text, or two separated by a tab."""
        if self.options.pair is None and line.count("\t") == 1:
            return dict(zip(self.split_by, line.split("\t"), strict=True))
        return super().record_of(line)

    def check_gold(self, record: Record) -> str | None:
        """Why the record's label cannot be used, or None."""
        raise NotImplementedError

    def gold_of(self, record: Record) -> Any:
        """The target of a record."""
        raise NotImplementedError

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """One item: the framed text."""
        two = len(self.fields_of(record)) == 2
        second = self.encode(record["text_pair"]) if two else None
        sequence, cut = self.frame(self.encode(record["text"]), second)
        return [Item(index, [sequence], self.gold_of(record) if with_gold else None, cut)]

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Items."""
        return {self.term: len(batch["first"])}


@OBJECTIVES.register("classify", options=ClassifyOptions)
class Classify(Pooled):
    """Which class a text is of."""

    options: ClassifyOptions
    term = "classify"
    metric = "accuracy"

    def __init__(self, options: OwnOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        self.labels = chosen(options.labels, options.name)
        self.number = {label: i for i, label in enumerate(self.labels)}
        self.has_counterfactual = len(self.labels) == 2 and not options.multi_label
        self.heads = {"classify": sequence_head(options, self.trunk, len(self.labels))}
        weights = options.class_weights
        require(
            weights is None or len(weights) == len(self.labels),
            f"objective.class_weights has {len(weights or ())} weights for {len(self.labels)} "
            f"labels ({', '.join(self.labels)})",
        )

    @classmethod
    def resolve(cls, options: OwnOptions, table: Table) -> Any:
        """Label set and balanced weights from the training records."""
        options = super().resolve(options, table)
        values = [v for r in table.records for v in listed(r.get("label"), options.multi_label)]
        values = [value for value in values if label_problem(value) is None]
        labels = options.labels or infer_labels(values, table.path)
        weights = options.class_weights
        if weights == "balanced":
            weights = class_weights([v for v in values if label_text(v) in labels], labels)
        return dataclasses.replace(options, labels=labels, class_weights=weights)

    @classmethod
    def metrics(cls, options: OwnOptions) -> tuple[Metric, ...]:
        """The loss, and what scikit-learn counts."""
        return super().metrics(options) + metrics.CLASSIFICATION

    def offered(self, table: Table) -> list[str]:
        """Without roc_auc where there are not exactly two classes, both of them in the table;
        without mcc where there is one; of several labels a row without either."""
        classes: set[str] = set()
        if not self.options.multi_label:
            classes = {label_text(record["label"]) for record in table.records}
        has = {"mcc": len(classes) > 1, "roc_auc": len(self.labels) == len(classes) == 2}
        return [name for name in super().offered(table) if has.get(name, True)]

    def check_gold(self, record: Record) -> str | None:
        """Labels must be in the set."""
        value: Any = record.get("label")
        if self.options.multi_label and not isinstance(value, (list, tuple)):
            return f"label is {value!r}, and objective.multi_label needs a list"
        for label in value if self.options.multi_label else [value]:
            problem = label_problem(label)
            if problem:
                return f"label {problem}"
            if label_text(label) not in self.number:
                return f"label {label!r} is not in the label set {', '.join(self.labels)}"
        return None

    def gold_of(self, record: Record) -> np.ndarray | np.int64:
        """The class's number, or for several labels a vector of 0 and 1."""
        if not self.options.multi_label:
            return np.int64(self.number[label_text(record["label"])])
        target_C = np.zeros(len(self.labels), dtype=np.float32)
        target_C[[self.number[label_text(label)] for label in record["label"]]] = 1
        return target_C

    def label_counts(self, table: Table) -> dict[str, int]:
        """Of every label."""
        several = self.options.multi_label
        values = (label_text(v) for r in table.records for v in listed(r["label"], several))
        found = collections.Counter(values)
        return {label: found[label] for label in self.labels}

    def counterfactual_target(self, item: Item) -> np.int64 | None:
        """The other one of two classes."""
        return np.int64(1 - item.target) if self.has_counterfactual else None

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """labels: int64[S], or float32 [S, C] for several; class_weights: float32[C], if any."""
        if examples[0].target is None:
            return {}
        found = {"labels": np.stack([item.target for item in examples])}
        if self.options.class_weights is not None:
            found["class_weights"] = np.array(self.options.class_weights, dtype=np.float32)
        return found

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The cross-entropy, and accuracy."""
        return self.terms(self.class_logits(hidden_BTD, heads, batch), batch)

    def class_logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> Tensor:
        """[S, C], float32."""
        return heads["classify"](hidden_BTD, self.layout(batch))

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The class logits, for rules that compare distributions."""
        if self.options.multi_label:
            return {}
        return {self.term: self.class_logits(hidden_BTD, heads, batch)}

    def terms(self, logits_SC: Tensor, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Cross-entropy and accuracy of class logits."""
        labels, count = batch["labels"], length_of(logits_SC)
        if self.options.multi_label:
            each_SC = F.binary_cross_entropy_with_logits(logits_SC, labels, reduction="none")
            right = ((logits_SC > 0) == (labels > 0.5)).all(dim=-1)
            return {
                self.term: Term(each_SC.mean(dim=-1).sum(), count),
                "accuracy": Term(right.float().sum(), count),
            }
        each_S = F.cross_entropy(
            logits_SC,
            labels,
            weight=batch.get("class_weights"),
            label_smoothing=self.options.label_smoothing,
            reduction="none",
        )
        right = (logits_SC.argmax(dim=-1) == labels).float().sum()
        return {self.term: Term(each_S.sum(), count), "accuracy": Term(right, count)}

    def answers(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> list[Any]:
        """The probability of each class."""
        return self.probabilities(self.class_logits(hidden_BTD, heads, batch))

    def probabilities(self, logits_SC: Tensor) -> list[list[float]]:
        """Softmax, or for several labels each class's sigmoid."""
        if self.options.multi_label:
            return torch.sigmoid(logits_SC).tolist()
        return torch.softmax(logits_SC, dim=-1).tolist()

    def predictions(
        self, table: Table, items: list[Item], answers: list[Any]
    ) -> list[dict[str, Any]]:
        """label (or labels) and all probabilities."""
        found: list[dict[str, Any]] = []
        for values in answers:
            by_label = dict(zip(self.labels, values))
            if self.options.multi_label:
                shown: dict[str, Any] = {
                    "labels": [label for label, p in by_label.items() if p >= 0.5]
                }
            else:
                best = max(by_label, key=by_label.__getitem__)
                shown = {"label": best, "probability": by_label[best]}
            found.append(shown | {"probabilities": by_label})
        return found

    def report(self, table: Table, predictions: list[dict[str, Any]]) -> Report:
        """As scikit-learn counts."""
        probabilities = np.array([list(p["probabilities"].values()) for p in predictions])
        gold = np.stack([self.gold_of(record) for record in table.records])
        function = metrics.multi_label if self.options.multi_label else None
        return (function or metrics.classification)(gold, probabilities, self.labels)


def listed(value: Any, several: bool) -> list[Any]:
    """A record's labels as a list."""
    if several:
        return list(value) if isinstance(value, (list, tuple)) else []
    return [] if value is None else [value]
