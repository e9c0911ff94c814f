"""Tagging: a label for every word (named entities, parts of speech).

    loss = - sum over words log softmax(z_word)[tag]

Words become pieces one by one; the tag stands at a word's first piece for an encoder (Devlin et al.
2019, section 5.3) and at its last for a decoder, which has seen the whole word only there. A
sentence that is too long is read in several windows, so that every word gets a tag.

Shapes: B rows, T tokens, W words of the batch, C tags, D model width.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tables.labels import label_problem, label_text, tag_labels
from nanolm.data.tokenizer import Tokenizer
from nanolm.data.words import UNSPACED
from nanolm.errors import require
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.base import FramedOptions, Task, chosen
from nanolm.finetune.tasks.heads import WordHead
from nanolm.finetune.tasks.items import Item, texts_problem
from nanolm.finetune.tasks.metrics import Metric, Report, higher
from nanolm.model.heads import HeadRequest
from nanolm.objectives.base import Term, length_of
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagOptions(FramedOptions):
    """A label for every word."""

    name: str = "tag"
    labels: list[str] | None = None
    """The tag set; null: inferred from the train split, in order, and stored with the model."""
    spaces: Literal["auto", "always", "never"] = "auto"
    """Whether words are joined by spaces; auto: except beside scripts that write none."""
    head: WordHead = "linear"
    """linear: one layer; transform: behind what BERT has before its vocabulary, as in ModernBERT's
    published heads."""
    head_dropout: float = 0.1
    """Dropout before the head's last layer."""

    def __post_init__(self) -> None:
        value = self.head_dropout
        require(0 <= value < 1, f"objective.head_dropout={value} must lie in [0, 1)")


@OBJECTIVES.register("tag", options=TagOptions)
class Tag(Task):
    """What kind of word each word is."""

    options: TagOptions
    movable = False
    fields = ("tokens",)
    gold = ("tags",)
    metric = "f1"
    term = "tag"

    def __init__(self, options: TagOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        self.labels = chosen(options.labels, options.name)
        self.number = {label: i for i, label in enumerate(self.labels)}
        head = {"n_classes": len(self.labels), "dropout": options.head_dropout}
        head["transform"] = options.head == "transform"
        self.heads = {"tag": HeadRequest("words", head)}

    @classmethod
    def resolve(cls, options: TagOptions, table: Table) -> TagOptions:
        """The tag set of the training records."""
        tags = [tag for record in table.records for tag in as_list(record.get("tags"))]
        tags = [tag for tag in tags if label_problem(tag) is None]
        return dataclasses.replace(options, labels=options.labels or tag_labels(tags, table.path))

    @classmethod
    def metrics(cls, options: TagOptions) -> tuple[Metric, ...]:
        """The loss, and what seqeval or scikit-learn counts."""
        return super().metrics(options) + higher("accuracy") + metrics.TAGGING

    @classmethod
    def metric_of(cls, options: TagOptions) -> str:
        """F1 of entities where tags mark spans, else the accuracy of tokens."""
        spans = metrics.marks_spans(options.labels or [])
        return cls.metric if spans else "token_accuracy"

    def offered(self, table: Table) -> list[str]:
        """F1 of entities, where there is one to be found; or where tags mark no spans its mean over
        the tags."""
        spans = metrics.marks_spans(self.labels)
        absent = {f"{'macro_' if spans else ''}{name}" for name in metrics.PRECISION_RECALL_F1}
        if spans and all(tag == "O" for record in table.records for tag in tags_of(record)):
            absent |= set(metrics.PRECISION_RECALL_F1)
        return [name for name in super().offered(table) if name not in absent]

    def check(self, record: Record, *, with_gold: bool) -> str | None:
        """Words must be there, not empty, and have one known tag each."""
        words = as_list(record.get("tokens"))
        if not words:
            return "tokens is empty"
        problem = texts_problem("tokens", words)
        if problem or not with_gold:
            return problem
        tags = as_list(record.get("tags"))
        if len(tags) != len(words):
            return f"{len(words)} tokens have {len(tags)} tags"
        problem = next(filter(None, map(label_problem, tags)), None)
        if problem:
            return f"a tag {problem}"
        unknown = next((tag for tag in tags if label_text(tag) not in self.number), None)
        if unknown is not None:
            return f"tag {unknown!r} is not in the tag set {', '.join(self.labels)}"
        return None

    def label_counts(self, table: Table) -> dict[str, int]:
        """Of every tag."""
        found = collections.Counter(tag for record in table.records for tag in tags_of(record))
        return {label: found[label] for label in self.labels}

    def record_of(self, line: str) -> Record:
        """The words of a line: what spaces separate, or the characters of an unspaced script."""
        words = line.split()
        if len(words) == 1 and UNSPACED.search(line):
            words = list(line.strip())
        return {"tokens": words}

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """One item, or several windows of whole words when the sentence is too long."""
        words = as_list(record["tokens"])
        pieces = self.tokenizer.encode_batch(spaced(words, self.options.spaces))
        room = self.length - self.n_specials(1)
        before = len(self.framing.sides(self.tokenizer, 1)[0])
        cut = sum(max(0, len(ids) - room) for ids in pieces)
        pieces = [ids[:room] for ids in pieces]
        tags = tags_of(record) if with_gold else []
        items, begin = [], 0
        while begin < len(words):
            stop, total = begin, 0
            while stop < len(words) and total + len(pieces[stop]) <= room:
                total += len(pieces[stop])
                stop += 1
            part = pieces[begin:stop]
            sequence, _ = self.frame(np.concatenate(part))
            ends = before + np.cumsum([len(ids) for ids in part])
            places = ends - [len(ids) for ids in part] if self.framing.two_sided else ends - 1
            target = [self.number[tag] for tag in tags[begin:stop]] if with_gold else None
            items.append(Item(index, [sequence], target, cut, places))
            begin, cut = stop, 0
        return items

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """word_index int64[W], flat places; words int64[items]; labels int64[W]."""
        lengths = [len(item.sequences[0].tokens) for item in examples]
        starts = np.cumsum([0, *lengths[:-1]])
        places = np.concatenate([s + item.extra for s, item in zip(starts, examples)])
        found = {
            "word_index": batch["index"][places],
            "words": np.array([len(item.extra) for item in examples], dtype=np.int64),
        }
        if examples[0].target is not None:
            found["labels"] = np.concatenate([item.target for item in examples]).astype(np.int64)
        return found

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Words."""
        return {"tag": len(batch["word_index"])}

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tag logits of all words, [W, C]."""
        return {"tag": heads["tag"](hidden_BTD, batch["word_index"])}

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """The cross-entropy over words, and accuracy."""
        logits_WC = self.logits(hidden_BTD, heads, batch)["tag"]
        labels_W = batch["labels"]
        count = length_of(labels_W)
        right = (logits_WC.argmax(dim=-1) == labels_W).float().sum()
        loss = F.cross_entropy(logits_WC, labels_W, reduction="sum")
        return {"tag": Term(loss, count), "accuracy": Term(right, count)}

    def answers(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> list[Any]:
        """The number of the best tag of each word, item by item."""
        best_W = self.logits(hidden_BTD, heads, batch)["tag"].argmax(dim=-1)
        return [part.tolist() for part in best_W.split(batch["words"].tolist())]

    def predictions(
        self, table: Table, items: list[Item], answers: list[Any]
    ) -> list[dict[str, Any]]:
        """tokens, tags and entities of each record, its windows joined again."""
        tags: list[list[str]] = [[] for _ in table.records]
        for item, numbers in zip(items, answers, strict=True):
            tags[item.record] += [self.labels[number] for number in numbers]
        words = [as_list(record["tokens"]) for record in table.records]
        return [
            {"tokens": w, "tags": t, "entities": entities(w, t)}
            for w, t in zip(words, tags, strict=True)
        ]

    def report(self, table: Table, predictions: list[dict[str, Any]]) -> Report:
        """As seqeval counts."""
        gold = [tags_of(record) for record in table.records]
        predicted = [prediction["tags"] for prediction in predictions]
        return metrics.tagging(gold, predicted, spans=metrics.marks_spans(self.labels))


def as_list(value: Any) -> list[Any]:
    """Words or tags as a list; text is cut at its spaces."""
    if isinstance(value, str):
        return value.split()
    return list(value) if isinstance(value, (list, tuple)) else []


def tags_of(record: Record) -> list[str]:
    """The tags of a record as the tag set has them."""
    return [label_text(tag) for tag in as_list(record["tags"])]


def spaced(words: list[str], spaces: str) -> list[str]:
    """The words, each with the space that stands before it in running text."""
    if spaces == "never":
        return words
    joined = words[:1]
    for before, word in itertools.pairwise(words):
        unspaced = UNSPACED.match(before[-1]) or UNSPACED.match(word[0])
        joined.append(word if unspaced and spaces == "auto" else f" {word}")
    return joined


def entities(words: list[str], tags: list[str]) -> list[dict[str, Any]]:
    """The spans that BIO, BIOES, BILOU or BMEWO tags mark: type, start, stop (in words), words."""
    found: list[dict[str, Any]] = []
    open_: dict[str, Any] | None = None
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        begins = prefix in ("B", "S", "U", "W") or open_ is None or open_["type"] != kind
        if not kind:
            open_ = None
            continue
        if begins or open_ is None:
            open_ = {"type": kind, "start": i, "stop": i, "words": []}
            found.append(open_)
        open_["stop"] = i + 1
        open_["words"] = words[open_["start"] : i + 1]
        if prefix in ("E", "L", "S", "U", "W"):
            open_ = None
    return found
