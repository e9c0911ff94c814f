"""Prediction: records, or lines that a person typed, and what a saved task says about each.

line of text or JSON -> record -> table -> items -> learner -> one answer a record
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from nanolm.data.tables.files import Record, Table, object_in
from nanolm.data.tables.splits import pick
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.evaluation import predict
from nanolm.finetune.generation import write_answers
from nanolm.finetune.splits import TYPED, Remedies, make_split
from nanolm.finetune.tasks.base import Task, task_in
from nanolm.saved import Saved
from nanolm.training.engine import Engine

BLANK: Record = {}
"""Stands for an empty line, which is an input like any other but has no answer."""


class Predictor:
    """A saved task, ready to answer records."""

    def __init__(self, saved: Saved, world: World, batch: int, remedies: Remedies = TYPED) -> None:
        if not isinstance(saved.config, TaskConfig):
            raise UserError(
                f"{saved.folder} was pretrained, not fine-tuned: fine-tune it first "
                f"(`nanolm finetune`), or write with it (`nanolm generate`, `nanolm fill`)"
            )
        self.saved, self.world, self.batch, self.remedies = saved, world, batch, remedies
        self.data, self.task = saved.config.data, task_in(saved.learner)
        self.engine = Engine(saved.learner, world, saved.config, trains=False)

    def __call__(self, table: Table) -> list[Record]:
        """One prediction, or {"error": why}, per record, with the record's id where it has one.

        Raises UserError for a record that cannot be used, unless data.bad_rows is skip.
        """
        problems = [self.problem(record) for record in table.records]
        usable = pick(table, [i for i, problem in enumerate(problems) if problem is None])
        found = iter(self.answered(usable) if len(usable) else [])
        ids = [{"id": r["id"]} if "id" in r else {} for r in table.records]
        return [
            identity | (next(found) if problem is None else {"error": problem})
            for identity, problem in zip(ids, problems, strict=True)
        ]

    def problem(self, record: Record) -> str | None:
        """Why there is no answer for a record, which is said in its place."""
        if record is BLANK:
            return "the line is empty"
        skip = self.data.bad_rows == "skip"
        return self.task.check(record, with_gold=False) if skip else None

    def answered(self, table: Table) -> list[Record]:
        """One prediction per record; raises UserError for one that cannot be used."""
        split = make_split(
            "input", table, self.task, self.data, with_gold=False, remedies=self.remedies
        )
        if self.task.generates:
            return write_answers(self.saved, split.table, self.batch)
        return predict(self.engine, split, self.batch)


def lines_as_tables(lines: Iterable[str], task: Task, size: int) -> Iterator[Table]:
    """Tables of up to `size` records from lines of text or JSON; an empty line is BLANK."""
    numbered = ((n, line.rstrip("\r\n")) for n, line in enumerate(lines, start=1))
    while part := list(itertools.islice(numbered, size)):
        records = [record_of_line(line, f"standard input row {n}", task) for n, line in part]
        yield Table("standard input", records, [n for n, _ in part])


def decoded(stream: Iterable[bytes], where: str) -> Iterator[str]:
    """Lines of UTF-8, whatever the locale says, without a byte order mark before the first; raises
    UserError for a line that is none."""
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where} row {number} is not UTF-8 text (byte {error.start}); convert it first"
            ) from None


def record_of_line(line: str, where: str, task: Task) -> Record:
    """The record of a line of text or JSON; raises UserError, naming `where`, for broken JSON."""
    if not line.strip():
        return BLANK
    if line.lstrip().startswith("{"):
        return object_in(line, where)
    return task.record_of(line)
