"""What all tasks share: records become sequences, sequences a batch, hidden states answers.

    record --check, items--> Item --example, collate--> batch --inputs--> trunk --> hidden
    hidden --loss--> {term: (sum, count)}            hidden --answers--> one answer per item
    answers of a record's items --predictions--> what `nanolm predict` prints --report--> metrics

A sequence is framed as its trunk knows it (frames.py): <cls> A <sep> (B <sep>) for an encoder.

Shapes: B rows, T tokens of a row or sequence, S sequences, M tokens of all sequences, D model
width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tables.packing import rectangle, scatter
from nanolm.data.tables.stream import TaskRow
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError, require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.tasks.frames import FrameName, frame_of
from nanolm.finetune.tasks.heads import Layout
from nanolm.finetune.tasks.items import Item, Sequence
from nanolm.finetune.tasks.metrics import Metric, Report, lower
from nanolm.learner import Learner
from nanolm.model.heads import HeadRequest
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import Draw, Objective, Term
from nanolm.ops.contract import Kernels
from nanolm.ops.masks import Mask
from nanolm.registry import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """What every task has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FramedOptions(TaskOptions):
    """Options of tasks whose texts stand in a frame of special tokens."""

    frame: FrameName = "trunk"
    """trunk: as the trunk was pretrained; tokenizer: what a tokenizer.json itself puts around a
    text, as published decoders with a head of a task read it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions(FramedOptions):
    """Options of tasks that may read two texts as one sequence."""

    mark_shared: bool = False
    """Marks the tokens of the second text that stand in the first too, by the first one's segment
    embedding: the exact match feature of Chen et al. (2017, section 3.2)."""


OwnOptions: TypeAlias = Any
"""The options that the class at hand is registered with: its subclasses have others."""


class Task:
    """Base of the task objectives; see `nanolm.objectives.base.Objective` for the contract."""

    options: Options
    """A subclass names its own class here."""
    schema: ClassVar[type[Config]] = TaskConfig
    """The schema of a run that trains it."""
    trunks: tuple[str, ...] = ("encoder", "decoder", "two_stream")
    fields: tuple[str, ...] = ("text",)
    """Fields that every record must have, also to predict."""
    gold: tuple[str, ...] = ("label",)
    """Fields that it must have to be trained on or evaluated."""
    metric = "accuracy"
    """The figure by which the best checkpoint is chosen; see `metric_of`."""
    generates = False
    """Whether predictions are written (`finetune/generation.py`) instead of read from answers."""
    term = "task"
    """Name of the loss term."""
    scope = "rows"
    """"global_batch" when a row's loss depends on the other rows of the step."""
    reads_source = True
    """Whether an encoder-decoder's encoder will do as base; a task that needs the base's vocabulary
    head needs what that head reads."""
    movable = True
    """Whether tokens may change their places: no target points at one of them."""
    has_counterfactual = False
    """Whether there may be exactly two answers, so that a text's opposite has the other one."""
    split_by: tuple[str, ...] = ()
    """Columns whose content decides on which side of a carved split a record falls; see
    `split_columns`."""

    def __init__(self, options: OwnOptions, config: Config, tokenizer: Tokenizer) -> None:
        if not isinstance(config, TaskConfig):
            raise UserError(
                f"objective={options.name} is a task for labelled tables: use `nanolm finetune`"
            )
        self.options, self.tokenizer = options, tokenizer
        self.trunk, self.length = config.model.trunk, config.data.row_length
        self.packed = config.data.pack
        self.segments = config.model.n_segments >= 2
        self.mark_shared = isinstance(options, PairOptions) and options.mark_shared
        require(
            self.segments or not self.mark_shared,
            "objective.mark_shared marks tokens by segment embeddings, and this base has none: "
            "leave it out, or pretrain with model.n_segments=2",
        )
        self.heads: dict[str, HeadRequest] = {}
        self.weights = {self.term: 1.0}
        framed = isinstance(options, FramedOptions)
        self.framing = frame_of(self.trunk, options.frame if framed else "trunk")
        padding = {"lengths"} if self.framing.two_sided else set()
        self.masks = frozenset({"documents", "length_groups"} if self.packed else padding)
        self.compiled, self.in_line = config.train.compile, False

    # From records to items.

    @classmethod
    def resolve(cls, options: OwnOptions, table: Table) -> Any:
        """The options with what the training records decide (label sets) filled in."""
        return options

    @classmethod
    def gold_fields(cls, options: OwnOptions) -> tuple[str, ...]:
        """The columns that training needs besides `fields`, as far as options say."""
        return cls.gold

    @classmethod
    def metrics(cls, options: OwnOptions) -> tuple[Metric, ...]:
        """Every figure that evaluating it may give, each with its direction."""
        return lower("loss", cls.term)

    @classmethod
    def split_columns(cls, options: OwnOptions) -> tuple[str, ...]:
        """The columns by which val and folds are carved: what the task reads and nothing else, so
        that records which differ in an id or a label alone stay together."""
        return cls.split_by or cls.fields

    @classmethod
    def metric_of(cls, options: OwnOptions) -> str:
        """The figure by which the best checkpoint is chosen unless the user names another."""
        return cls.metric

    def offered(self, table: Table) -> list[str]:
        """Names of the figures that evaluating these records gives while it is trained, without
        those that every model has the same of there: nothing is chosen by them."""
        return [metric.name for metric in self.metrics(self.options)]

    def check(self, record: Record, *, with_gold: bool) -> str | None:
        """Why a record cannot be used, in words, or None."""
        raise NotImplementedError

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """The record made ready, token ids and all; one item, or one for each window."""
        raise NotImplementedError

    @property
    def cut_to(self) -> str:
        """How long a text may be and which key says so, for the note of those that were cut."""
        return f"data.row_length={self.length} tokens"

    def label_counts(self, table: Table) -> dict[str, int]:
        """How often each label occurs, for the user to see whether they are labels at all; nothing
        of a task without a set of labels."""
        return {}

    def messages_about(self, table: Table, items: list[Item]) -> list[str]:
        """What else a user should know of labelled records and their items."""
        return []

    def trained(self, items: list[Item]) -> list[Item]:
        """The items of the train split that are trained on; evaluation always reads all."""
        return items

    def targets_per_token(self, items: list[Item]) -> float:
        """What a decoder writes, in tokens to one that an encoder reads."""
        return 0.0

    def counterfactual_target(self, item: Item) -> Any | None:
        """The target of an item whose first text is made to say the opposite; None when there are
        not exactly two answers."""
        return None

    def record_of(self, line: str) -> Record:
        """A line of text as a record: its fields, separated by tabs."""
        parts = line.split("\t")
        require(
            len(parts) == len(self.fields),
            f"a line must hold {', '.join(self.fields)}, separated by tabs; got {line!r}",
        )
        return dict(zip(self.fields, parts))

    def n_specials(self, n_texts: int) -> int:
        """How many special tokens frame so many texts."""
        return self.framing.n_specials(self.tokenizer, n_texts)

    def frame(self, first: np.ndarray, second: np.ndarray | None = None) -> tuple[Sequence, int]:
        """(framed sequence of at most row_length tokens, tokens cut); the longer text is cut."""
        return self.framing.around(
            self.tokenizer, self.length, first, second, mark_shared=self.mark_shared
        )

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text; no more of it is encoded than could ever fit."""
        return self.tokenizer.encode(text)

    def arrange_for(self, kernels: Kernels) -> None:
        """Packed sequences lie in one row, by length, where every attention kernel runs length by
        length; elsewhere in a rectangle, whose width bounds what a masked row costs. A compiled
        block would be compiled anew for each batch's lengths, so it gets the rectangle too."""
        chosen = kernels.chosen("attention")
        serve = all(hasattr(kernel, "takes_length_groups") for kernel in chosen)
        self.in_line = self.packed and serve and not self.compiled

    def check_model(self, model: ModelConfig) -> None:
        """Raises UserError when the model can be trained on the task and yet not be asked it."""

    def require_heads(self, fresh: list[str], base: str) -> None:
        """Raises UserError when a head that must come from the base is fresh."""

    # From items to batches.

    def example(self, row: TaskRow, rng: np.random.Generator, draw: Draw) -> Item:
        """The item as it is: nothing about it is random."""
        return row.item

    def collate(self, examples: list[Item]) -> dict[str, np.ndarray]:
        """The sequences of all items in one rectangle, the layout's indices, and the targets."""
        sequences = [sequence for item in examples for sequence in item.sequences]
        batch, index_M = self.rows(sequences)
        ends_S = np.cumsum([len(sequence.tokens) for sequence in sequences])
        batch |= self.places(np.split(index_M, ends_S[:-1]))
        return batch | self.targets_of(examples, batch)

    def rows(self, sequences: list[Sequence]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(what the trunk reads, the flat places int64[M] of all sequences' tokens, end to end)."""
        tokens = [sequence.tokens for sequence in sequences]
        pad = self.tokenizer.roles().get("pad", 0)
        lengths_S = np.array([len(ids) for ids in tokens], dtype=np.int64)
        batch, index_M = rectangle(tokens, pad, packed=self.packed, in_line=self.in_line)
        if self.in_line:
            batch["length_groups"] = np.stack(
                np.unique(lengths_S, return_counts=True)[::-1], axis=1
            )
        if self.segments:
            special_V = self.tokenizer.special_mask
            segments_M = np.concatenate([s.segments(special_V) for s in sequences])
            batch["segments"] = scatter(batch["tokens"].shape, index_M, segments_M, 0)
        return batch, index_M

    def places(self, spans: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a Layout, from each sequence's flat places."""
        return {
            "index": np.concatenate(spans),
            "owner": np.repeat(np.arange(len(spans)), [len(span) for span in spans]),
            "first": np.array([span[0] for span in spans]),
            "last": np.array([span[-1] for span in spans]),
        }

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The arrays of the batch that the loss compares with."""
        raise NotImplementedError

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Number of targets of each term."""
        raise NotImplementedError

    # From hidden states to losses and answers.

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """Tokens, kept apart in packed rows or hidden behind their lengths in padded ones."""
        if self.packed:
            # Rows are in line on a CPU only (see `arrange_for`), where nobody waits for a device.
            length_groups = (
                tuple(map(tuple, batch["length_groups"].tolist()))
                if "length_groups" in batch
                else None
            )
            mask = Mask(documents=batch["documents"], length_groups=length_groups)
        else:
            mask = Mask(key_lengths=batch["lengths"] if self.framing.two_sided else None)
        return Inputs(
            tokens_BT=batch["tokens"],
            positions_BT=batch.get("positions"),
            segments_BT=batch.get("segments"),
            mask=mask,
        )

    def has_gold(self, batch: dict[str, Tensor]) -> bool:
        """Whether the batch has what the loss compares with."""
        return "labels" in batch

    def layout(self, batch: dict[str, Tensor]) -> Layout:
        """Where the sequences lie."""
        return Layout(batch["index"], batch["owner"], batch["first"], batch["last"])

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """Terms by name."""
        raise NotImplementedError

    def answers(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> list[Any]:
        """What the model says, one JSON value per item of the batch."""
        raise NotImplementedError

    # From answers to predictions and metrics.

    def predictions(
        self, table: Table, items: list[Item], answers: list[Any]
    ) -> list[dict[str, Any]]:
        """One prediction per record, from the answers to its items."""
        raise NotImplementedError

    def report(self, table: Table, predictions: list[dict[str, Any]]) -> Report:
        """Metrics of predictions against the records' own labels."""
        raise NotImplementedError


def as_objective(task: Task) -> Objective:
    """The task as the core knows it: the rest of `Objective` is asked of token streams only."""
    return cast(Objective, task)


def task_in(learner: Learner) -> Task:
    """The task that a fine-tuned learner holds."""
    return cast(Task, learner.objective)


def chosen(labels: list[str] | None, name: str) -> list[str]:
    """A task's label set; raises UserError when it was never filled in."""
    if labels is None:
        raise UserError(f"objective={name} has no labels: they come from the train split")
    return labels
