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
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from nanolm.config.ranges import Count
from nanolm.data.tables.files import Table, read_table
from nanolm.distributed.devices import DeviceWord
from nanolm.distributed.world import launch
from nanolm.errors import UserError
from nanolm.files import AGAIN, AtomicFile
from nanolm.finetune.ensemble import open_together
from nanolm.finetune.predict import Predictor, decoded, lines_as_tables
from nanolm.finetune.several import part_of
from nanolm.finetune.splits import ANSWERING, TYPED, other_data

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
    batch: Count = 64
    """Rows at a time."""
    device: DeviceWord = "auto"
    """auto, cpu or cuda."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the checkpoint was trained with."""


def run(arguments: Arguments) -> None:
    """Predict and write."""
    saved = open_together(
        arguments.run, arguments.ensemble, arguments.average, plugins=arguments.plugins
    )
    saved = part_of(saved, arguments.task)
    world = launch(saved.config.distributed, arguments.device)
    saved.learner.to(world.device)
    remedies = TYPED if arguments.file is None else ANSWERING
    predictor = Predictor(saved, world, arguments.batch, remedies)
    interactive = arguments.file is None and sys.stdin.isatty()
    if arguments.file is not None:
        table = read_table(arguments.file)
        tables: Iterable[Table] = [other_data(table, predictor.data.columns, arguments.columns)]
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
            if arguments.out is None:  # who writes lines slowly waits for their answers
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
        whole = AtomicFile(target, AGAIN, name=f"--out {path}")
        with whole if replaced else open(target, "wb") as file:
            yield lambda text: file.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write --out {path}: {error.strerror}") from None
