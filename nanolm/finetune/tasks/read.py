"""Extractive reading: the span of a context that answers a question, or none.

    loss = - sum_n [log p_start(s_n) + log p_end(e_n)] / 2   (Devlin et al. 2019, sections 4.2, 4.3)

A long context is read in windows that overlap by `stride` tokens. In a window that does not hold
the answer, and where there is none, the right span is the first token: such an empty window teaches
less than another, and training may leave some out (Alberti et al. 2019, "A BERT Baseline for the
Natural Questions"). An answer's score is log p_start + log p_end, each within its own window, so
that a window which is sure of its first token does not outbid one which is sure of a span; "no
answer" scores what the first token does in the window where it scores least.

Token ids become characters by their byte lengths, where the tokenizer loses nothing, or as the
package `tokenizers` tells of a tokenizer.json.

Shapes: B rows, T tokens, S sequences (one per window), M tokens of all windows, L longest window.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.data.tables.files import Record, Table
from nanolm.data.tokenizer import Tokenizer
from nanolm.data.words import UNSPACED
from nanolm.errors import require
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.base import PairOptions, Task
from nanolm.finetune.tasks.heads import WordHead
from nanolm.finetune.tasks.items import Item, Sequence, text_problem
from nanolm.finetune.tasks.metrics import Metric, Report, higher
from nanolm.finetune.tasks.ragged import columns, ragged, within
from nanolm.finetune.tasks.spans import Answer, answers_of, cut_out, find_nearest, token_span
from nanolm.model.heads import HeadRequest
from nanolm.objectives.base import Term, length_of
from nanolm.registry import OBJECTIVES

NO_SPAN = (0, 0)
GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, fill [0, 1) evenly and keep step with nothing in the data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions(PairOptions):
    """The span that answers a question."""

    name: str = "read"
    stride: int = 32
    """Tokens that neighbouring windows of a long context share."""
    question_length: int = 48
    """Longest question in tokens; longer ones are cut."""
    longest_answer: int = 48
    """Longest answer in tokens."""
    head: WordHead = "linear"
    """linear: one layer; transform: behind what BERT has before its vocabulary, as in ModernBERT's
    published heads."""
    empty_windows: float = 1.0
    """Share that training reads of the windows that lack an answer which stands elsewhere in their
    context. Evaluation and prediction read every window."""
    relocate: bool = True
    """An answer that does not stand where its record says is looked for in the context, nearest to
    that place; false refuses such a record."""
    no_answer: bool | None = None
    """Whether "none" is a possible answer; null: when a training record has none."""
    by_character: bool | None = None
    """Score by characters; null: when most training answers are in an unspaced script."""

    def __post_init__(self) -> None:
        sizes = (self.stride, self.question_length, self.longest_answer)
        require(
            min(sizes) >= 1, "objective.stride, question_length and longest_answer must be >= 1"
        )
        require(
            0 <= self.empty_windows <= 1,
            f"objective.empty_windows={self.empty_windows} is a share, between 0 and 1",
        )


class Window(NamedTuple):
    """Where a window's context tokens begin in the sequence, which bytes of the context each of
    them covers (begins and ends int64[n]), and whether the record has an answer that none of its
    windows holds whole."""

    offset: int
    begins: np.ndarray
    ends: np.ndarray
    unheld: bool = False


@OBJECTIVES.register("read", options=ReadOptions)
class Read(Task):
    """Where in a text the answer stands."""

    options: ReadOptions
    movable = False
    fields = ("question", "context")
    gold = ("answers",)
    metric = "f1"
    term = "read"
    split_by = ("context",)

    def __init__(self, options: ReadOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        require(
            tokenizer.can_place,
            "objective=read must map tokens back to characters, and this tokenizer normalises "
            "text; use a base whose tokenizer `nanolm prepare` trained",
        )
        self.question_length = min(options.question_length, self.length // 2)
        room = self.length - self.n_specials(2) - self.question_length
        require(
            options.stride < room,
            f"objective.stride={options.stride} leaves no way forward: beside a question of "
            f"{self.question_length} tokens a window has room for {room} of the context; choose a "
            f"smaller stride or question_length, or a greater data.row_length",
        )
        self.heads = {"read": HeadRequest("span", {"transform": options.head == "transform"})}

    @classmethod
    def resolve(cls, options: ReadOptions, table: Table) -> ReadOptions:
        """Whether there may be no answer, and whether characters are words, from the training
        records."""
        golds = [answers_of(record) or [] for record in table.records]
        text = "".join(answer.text for answers in golds for answer in answers)
        unspaced = len(UNSPACED.findall(text)) > 0.5 * max(1, len(text))
        none = any(not answers for answers in golds)
        return dataclasses.replace(
            options,
            no_answer=none if options.no_answer is None else options.no_answer,
            by_character=unspaced if options.by_character is None else options.by_character,
        )

    @property
    def cut_to(self) -> str:
        """Only questions are cut: a context is read to its end."""
        return (
            f"a question of {self.question_length} tokens (objective.question_length, at most half "
            f"of data.row_length)"
        )

    @classmethod
    def metrics(cls, options: ReadOptions) -> tuple[Metric, ...]:
        """The loss, the accuracy of windows, and SQuAD's figures."""
        return super().metrics(options) + higher("accuracy") + metrics.READING

    def offered(self, table: Table) -> list[str]:
        """The figures of each kind of question only where both kinds are there."""
        n_answered = sum(bool(answers_of(record)) for record in table.records)
        both = 0 < n_answered < len(table)
        names = super().offered(table)
        return [name for name in names if both or "_answer_" not in name]

    def check(self, record: Record, *, with_gold: bool) -> str | None:
        """Texts must be there, and answers stand where they say."""
        problem = text_problem(record, self.fields)
        if problem or not with_gold:
            return problem
        answers = answers_of(record)
        if answers is None:
            return "answers is no list of {text, answer_start}"
        if answers and self.located(record) is None:
            text, start = answers[0]
            return f"the answer {text!r} does not stand at character {start} of its context"
        if not answers and self.options.no_answer is False:
            return "there is no answer, and objective.no_answer is false"
        return None

    def located(self, record: Record) -> Answer | None:
        """The first gold answer that stands in the context, where it really stands."""
        for answer in answers_of(record) or []:
            start = find_nearest(record["context"], answer) if answer.text.strip() else None
            if start is not None and (start == answer.start or self.options.relocate):
                return Answer(answer.text, start)
        return None

    def items(self, record: Record, index: int, *, with_gold: bool) -> list[Item]:
        """One item for each window of the context."""
        question = self.encode(record["question"])
        cut = max(0, len(question) - self.question_length)
        question = question[: self.question_length]
        context, begins, ends = self.tokenizer.encode_places(record["context"])
        answer = self.located(record) if with_gold else None
        span = None if answer is None else token_span(record["context"], answer, begins, ends)
        room = self.length - self.n_specials(2) - len(question)
        step = room - self.options.stride
        items = []
        for start in range(0, max(1, len(context) - self.options.stride), step):  # to the end
            stop = min(len(context), start + room)
            sequence, _ = self.frame(question, context[start:stop])
            window = Window(sequence.second, begins[start:stop], ends[start:stop])
            target = target_of(span, start, stop, sequence) if with_gold else None
            items.append(Item(index, [sequence], target, cut, window))
            cut = 0
        if span is not None and all(item.target == NO_SPAN for item in items):
            for item in items:
                item.extra = item.extra._replace(unheld=True)
        return items

    def messages_about(self, table: Table, items: list[Item]) -> list[str]:
        """Answers that were looked for elsewhere in their context, those that no window holds
        (longer than the stride, they may fall between two) and those that are too long to be
        given."""
        found = [self.located(record) for record in table.records]
        moved = sum(
            answer is not None and answer.start not in [a.start for a in answers_of(record) or []]
            for record, answer in zip(table.records, found, strict=True)
        )
        unheld = len({item.record for item in items if item.extra.unheld})
        most = self.options.longest_answer
        long = len({item.record for item in items if item.target[1] - item.target[0] >= most})
        notes = {
            f"{moved:,} answers do not stand where their record says and were relocated": moved,
            f"{unheld:,} answers stand in no window whole, and nothing is trained on them; "
            f"objective.stride is how long an answer is surely held": unheld,
            f"{long:,} answers are longer than objective.longest_answer={most} tokens, so they are "
            f"never given": long,
        }
        return [note for note, count in notes.items() if count]

    def trained(self, items: list[Item]) -> list[Item]:
        """Every window with its answer, every window of a record without one, and evenly spread
        `empty_windows` of the others. An answer that no window holds is there all the same, so
        "none" would be a wrong target: its windows are left out."""
        answered = {item.record for item in items if item.target != NO_SPAN}
        kept, n_empty = [], 0
        for item in items:
            if item.extra.unheld:
                continue
            if item.target == NO_SPAN and item.record in answered:
                n_empty += 1
                if n_empty * GOLDEN % 1 >= self.options.empty_windows:
                    continue
            kept.append(item)
        return kept

    def targets_of(
        self, examples: list[Item], batch: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """place int64[M] within the window; columns int64[L]; allowed int64[M], 1 where a span may
        begin or end; labels int64 [S, 2], start and end."""
        lengths = np.array([len(item.sequences[0].tokens) for item in examples])
        place = within(lengths)
        first = np.repeat([item.extra.offset for item in examples], lengths)
        last = np.repeat([item.extra.offset + len(item.extra.begins) for item in examples], lengths)
        allowed = (place == 0) | ((place >= first) & (place < last))
        found = {
            "place": place,
            "columns": columns(lengths),
            "allowed": allowed.astype(np.int64),
        }
        if examples[0].target is not None:
            found["labels"] = np.array([item.target for item in examples], dtype=np.int64)
        return found

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Windows."""
        return {"read": len(batch["first"])}

    def scores(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(start, end) scores [S, L], -inf where no span may begin or end."""
        scores_M2 = heads["read"](hidden_BTD, batch["index"])
        scores_M2 = scores_M2.masked_fill(batch["allowed"][:, None] == 0, -torch.inf)
        shape = (len(batch["first"]), len(batch["columns"]))
        start, end = (
            ragged(scores_M2[:, side], batch["owner"], batch["place"], shape) for side in (0, 1)
        )
        return start, end

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """Half the cross-entropy of start and of end; accuracy: both are right."""
        scores = self.scores(hidden_BTD, heads, batch)
        labels_S2 = batch["labels"]
        count = length_of(labels_S2)
        losses, right = [], torch.ones(len(labels_S2), dtype=torch.bool, device=labels_S2.device)
        for side, scores_SL in enumerate(scores):
            losses.append(F.cross_entropy(scores_SL, labels_S2[:, side], reduction="sum"))
            right &= scores_SL.argmax(dim=-1) == labels_S2[:, side]
        loss = (losses[0] + losses[1]) / 2
        return {"read": Term(loss, count), "accuracy": Term(right.float().sum(), count)}

    def answers(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> list[Any]:
        """[score, first token, last token, score of no answer] of each window's best span."""
        scores = self.scores(hidden_BTD, heads, batch)
        start_SL, end_SL = (scores_SL.log_softmax(dim=-1) for scores_SL in scores)
        none_S = start_SL[:, 0] + end_SL[:, 0]
        start_SL[:, 0] = end_SL[:, 0] = -torch.inf
        width = start_SL.shape[1]
        pairs_SLL = start_SL[:, :, None] + end_SL[:, None, :]
        possible_LL = torch.ones(width, width, dtype=torch.bool, device=start_SL.device).triu()
        possible_LL = possible_LL.tril(self.options.longest_answer - 1)
        best_S, flat_S = pairs_SLL.masked_fill(~possible_LL, -torch.inf).flatten(1).max(dim=-1)
        columns = (best_S, flat_S // width, flat_S % width, none_S)
        return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def predictions(
        self, table: Table, items: list[Item], answers: list[Any]
    ) -> list[dict[str, Any]]:
        """answer with the characters [start, end) of the context and its score; "" for none."""
        best: list[Any] = [None] * len(table.records)
        none = [float("inf")] * len(table.records)
        for item, (score, first, last, no_answer) in zip(items, answers, strict=True):
            r = item.record
            none[r] = min(none[r], no_answer)
            if best[r] is None or score > best[r][0]:
                window: Window = item.extra
                begin = int(window.begins[int(first) - window.offset])
                best[r] = (score, begin, int(window.ends[int(last) - window.offset]))
        found = []
        for record, span, no_answer in zip(table.records, best, none, strict=True):
            score, begin, end = span
            if self.options.no_answer and no_answer > score:
                found.append({"answer": "", "start": None, "end": None, "score": no_answer - score})
            else:
                found.append(cut_out(record["context"], begin, end) | {"score": score - no_answer})
        return found

    def report(self, table: Table, predictions: list[dict[str, Any]]) -> Report:
        """Exact match and F1, as SQuAD defines them or by characters."""
        golds = [[answer.text for answer in answers_of(record) or []] for record in table.records]
        guesses = [prediction["answer"] for prediction in predictions]
        return metrics.reading(golds, guesses, by_character=bool(self.options.by_character))


def target_of(
    span: tuple[int, int] | None, start: int, stop: int, sequence: Sequence
) -> tuple[int, int]:
    """The span within a window's sequence; the first token when the window does not hold it."""
    if span is None or span[0] < start or span[1] >= stop:
        return NO_SPAN
    shift = sequence.second - start
    return span[0] + shift, span[1] + shift
