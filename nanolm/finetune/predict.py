"""Prediction: records, or lines that a person typed, and what a saved task says about each.

line of text or JSON -> record -> table -> items -> learner -> one answer a record
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator

from nanolm.data.tables.files import Record, Table
from nanolm.distributed.world import World
from nanolm.errors import UserError, require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.evaluation import predict
from nanolm.finetune.generation import write_answers
from nanolm.finetune.splits import make_split
from nanolm.finetune.tasks.base import Task
from nanolm.saved import Saved
from nanolm.training.engine import Engine


class Predictor:
    """A saved task, ready to answer records."""

    def __init__(self, saved: Saved, world: World, batch: int) -> None:
        require(
            isinstance(saved.config, TaskConfig),
            f"{saved.folder} was pretrained, not fine-tuned: fine-tune it first (`nanolm finetune`)"
            f", or write with it (`nanolm generate`, `nanolm fill`)",
        )
        self.saved, self.world, self.batch = saved, world, batch
        self.task: Task = saved.learner.objective
        self.engine = Engine(saved.learner, world, saved.config, trains=False)

    def __call__(self, table: Table) -> list[Record]:
        """One prediction per record, with the record's id where it has one."""
        split = make_split("input", table, self.task, self.saved.config.data, with_gold=False)
        if self.task.generates:
            found = write_answers(self.saved, split.table, self.batch)
        else:
            found = predict(self.engine, split, self.batch)
        ids = [{"id": r["id"]} if "id" in r else {} for r in split.table.records]
        return [identity | prediction for identity, prediction in zip(ids, found, strict=True)]


def lines_as_tables(lines: Iterable[str], task: Task, size: int) -> Iterator[Table]:
    """Tables of up to `size` records from lines of text or JSON."""
    numbered = ((n, line.rstrip("\r\n")) for n, line in enumerate(lines, start=1))
    filled = ((n, line) for n, line in numbered if line.strip())
    while part := list(itertools.islice(filled, size)):
        records = [record_of_line(line, f"standard input row {n}", task) for n, line in part]
        yield Table("standard input", records, [n for n, _ in part])


def record_of_line(line: str, where: str, task: Task) -> Record:
    """The record of a line of text or JSON; raises UserError, naming `where`, for broken JSON."""
    if line.lstrip().startswith("{"):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not valid JSON: {error}") from None
        return value
    return task.record_of(line)
