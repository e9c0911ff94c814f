"""`nanolm predict RUN [FILE]`: what a fine-tuned model says, one JSON object a line.

FILE is any table that fine-tuning reads, without labels; without FILE, lines come from standard
input, each a text (a pair or a question separated by tabs) or a JSON object. At a terminal every
line is answered at once. Everything comes from the saved folder alone.

There is one line of output for every record or line of input, in order: one that cannot be answered
(an empty line; with data.bad_rows=skip, an unusable row) gets {"error": why}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from nanolm.data.tables.files import Record, Table, read_table
from nanolm.data.tables.splits import pick
from nanolm.distributed.world import World, launch
from nanolm.errors import UserError, require
from nanolm.files import AtomicFile
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.ensemble import open_together
from nanolm.finetune.evaluation import predict
from nanolm.finetune.generation import write_answers
from nanolm.finetune.several import part_of
from nanolm.finetune.splits import make_split, renamed
from nanolm.finetune.tasks.base import Task
from nanolm.saved import Saved
from nanolm.training.engine import Engine

POSITIONAL = ("run", "file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Predict with a fine-tuned model."""

    run: str
    """Folder of a fine-tuning run (its best checkpoint is used) or of a checkpoint."""
    ensemble: list[str] = dataclasses.field(default_factory=list)
    """Further runs of the same task, such as other seeds: their average with `run` answers."""
    average: Literal["logits", "weights"] = "logits"
    """What of an ensemble is averaged; weights need runs from the same pretrained weights."""
    file: str | None = None
    """Table to read; null: standard input, a text or a JSON object a line."""
    out: str | None = None
    """JSONL file to write; null: standard output."""
    task: str | None = None
    """Which task of a run of several."""
    columns: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Which column holds a field, where it has another name: {text: question}; those of the run's
    own data.columns that the file has are taken unless they are named here."""
    batch: int = 64
    """Rows at a time."""
    device: str = "auto"
    """auto, cpu or cuda."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the checkpoint was trained with."""

    def __post_init__(self) -> None:
        require(self.batch >= 1, f"--batch {self.batch} must be at least 1")


BLANK: Record = {}
"""Stands for an empty line, which is an input like any other but has no answer."""


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
        skip = self.saved.config.data.bad_rows == "skip"
        return self.task.check(record, with_gold=False) if skip else None

    def answered(self, table: Table) -> list[Record]:
        """One prediction per record; raises UserError for one that cannot be used."""
        split = make_split("input", table, self.task, self.saved.config.data, with_gold=False)
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
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not valid JSON: {error}") from None
        return value
    return task.record_of(line)


def run(arguments: Arguments) -> None:
    """Predict and write."""
    saved = open_together(
        arguments.run, arguments.ensemble, arguments.average, plugins=arguments.plugins
    )
    saved = part_of(saved, arguments.task)
    world = launch(saved.config.distributed, arguments.device)
    saved.learner.to(world.device)
    predictor = Predictor(saved, world, arguments.batch)
    interactive = arguments.file is None and sys.stdin.isatty()
    if arguments.file is not None:
        table = read_table(arguments.file)
        own = saved.config.data.columns
        own = {field: column for field, column in own.items() if column in table.columns}
        table = renamed(table, own | arguments.columns)
        tables: Iterable[Table] = [table]
    else:
        size = 1 if interactive else arguments.batch
        lines = decoded(sys.stdin.buffer, "standard input")
        tables = lines_as_tables(lines, predictor.task, size)
    if interactive:
        print(f"one {' <tab> '.join(predictor.task.fields)} a line", file=sys.stderr)
    with _output(arguments.out) as out:
        for table in tables:
            for prediction in predictor(table):
                out(json.dumps(prediction, ensure_ascii=False) + "\n")
                if interactive:
                    sys.stdout.flush()


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[Callable[[str], Any]]:
    """What writes text to the standard output, or to a file that is whole or left as it was; a
    pipe or a device cannot be replaced and is written as it comes."""
    if path is None:
        yield sys.stdout.write
        return
    target = pathlib.Path(path).resolve()
    replaced = target.is_file() or not target.exists()
    try:
        with AtomicFile(target) if replaced else open(target, "wb") as file:
            yield lambda text: file.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write --out {path}: {error.strerror}") from None
