"""The source `table:FILE:FIELD[+FIELD…]`: the texts of a labelled file, without its labels.

Further pretraining on a task's own text (Gururangan et al. 2020, "Don't stop pretraining") reads
the files that fine-tuning reads: JSONL, JSON, SQuAD, CSV/TSV, Parquet, CoNLL columns. A record is
one document: its fields in the order named, one a line. A field that is a list of words (`tokens`)
is joined by the option `joiner`, a space unless told otherwise: Chinese wants none.

    nanolm prepare table:reviews/train.jsonl:text table:ner/train.conll:tokens --out data
        --source_options '{table: {joiner: ""}}'
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from nanolm.data.prepare.sources import SOURCES, SourceOptions
from nanolm.data.tables.files import Record, Table, read_table
from nanolm.errors import require

ROWS_PER_PIECE = 4096


@functools.lru_cache(maxsize=2)
def open_table(path: str, modified: float) -> Table:
    """The table of a file as it was at a time; read once a process, not once a piece."""
    return read_table(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptions(SourceOptions):
    """Options of the source `table`."""

    name: str = "table"
    joiner: str = " "
    """What stands between the words of a field that is a list of words."""


@dataclasses.dataclass(frozen=True)
class RecordsPiece:
    """Records [begin, end) of a file."""

    path: str
    modified: float
    fields: tuple[str, ...]
    joiner: str
    begin: int
    end: int
    size: int

    @property
    def label(self) -> str:
        """What error messages call it."""
        return f"table:{self.path}"

    def identity(self) -> list:
        """The range, the fields, and when the file was last written."""
        return [self.label, self.modified, *self.fields, self.joiner, self.begin, self.end]

    def documents(self, counts: Counter) -> Iterator[str]:
        """The texts of the records, in order; one that lacks a field is counted as dropped."""
        table = open_table(self.path, self.modified)
        for record in table.records[self.begin : self.end]:
            text = self.text(record)
            if text is None:
                counts[f"dropped/no text in field {'+'.join(self.fields)}"] += 1
            else:
                yield text

    def text(self, record: Record) -> str | None:
        """The fields of a record, one a line; None when one is absent or holds no text."""
        lines = [flat(record.get(field), self.joiner) for field in self.fields]
        found = [line for line in lines if line is not None]
        return "\n".join(found) if len(found) == len(lines) else None


def flat(value: Any, joiner: str) -> str | None:
    """A text as it is, a list of texts joined, None for anything else."""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return joiner.join(value)
    return value if isinstance(value, str) else None


@SOURCES.register("table", options=TableOptions)
class TableText:
    """The named fields of a labelled file."""

    heeds = ()  # the argument names the fields, and `read_table` decodes

    def __init__(self, options: TableOptions) -> None:
        self.options = options
        path, _, fields = options.argument.rpartition(":")
        require(
            bool(path and fields),
            f"table:{options.argument} names no field; write table:FILE:FIELD, or several with +",
        )
        self.path, self.fields = path, tuple(fields.split("+"))

    def pieces(self) -> Iterator[RecordsPiece]:
        """Ranges of 4,096 records; raises UserError for a field that the file does not have."""
        require(os.path.isfile(self.path), f"there is no file {self.path}; check the path")
        modified = os.path.getmtime(self.path)
        table = open_table(self.path, modified)
        for field in self.fields:
            require(
                field in table.columns,
                f"{self.path} has no field {field!r}; name one of {', '.join(table.columns)} after "
                f"the last colon of table:FILE:FIELD",
            )
        share = os.path.getsize(self.path) / len(table)
        for begin in range(0, len(table), ROWS_PER_PIECE):
            end = min(len(table), begin + ROWS_PER_PIECE)
            size = int(share * (end - begin))
            yield RecordsPiece(
                self.path, modified, self.fields, self.options.joiner, begin, end, size
            )
