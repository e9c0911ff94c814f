"""Tables of labelled examples: one file becomes a list of records, whatever its format.

    .jsonl            one JSON object a line               .json   a list of objects, or SQuAD
    .csv .tsv         a header line, then rows             .parquet
    .conll .bio .iob  one word a line, its tag in the last column, an empty line after a sentence;
                      .txt is read as such a file

JSON may be laid out either way in both suffixes. A CSV whose header has ; and no comma is separated
by ;. A TSV has no quoting where each of its lines has the header's number of columns, except for
cells that are quoted as a whole. The columns of a column file are split at spaces and tabs only;
its record has `tokens` and `tags` and, of three columns or more, each as column_1, column_2, ….

All but Parquet also .gz or .zst. SQuAD files (v1.1 and v2) become one record per question with
`id`, `context`, `question` and `answers`; column files one record per sentence with `tokens` and
`tags`. This is where a fine-tuning batch begins: file -> records -> items
(`nanolm.finetune.splits`) -> rows.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
from typing import Any

import pyarrow.parquet

from nanolm.data.readers import COMPRESSIONS, open_text, unreadable_is_told
from nanolm.errors import UserError

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".conll", ".bio", ".iob", ".txt")
BLANKS = " \t\r"
"""What separates the columns of a column file: a no-break space is part of a word."""
LONGEST_CELL = (1 << 31) - 1


@dataclasses.dataclass
class Table:
    """The records of one split, where they come from, and the number of each in its file (from 1:
    lines of JSONL and CSV without the header, sentences of column files, questions of SQuAD)."""

    path: str
    records: list[Record]
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def columns(self) -> list[str]:
        """The columns of all records, in the order in which they turn up: the first record may lack
        what others have."""
        return list(dict.fromkeys(itertools.chain.from_iterable(self.records)))

    def where(self, index: int) -> str:
        """How an error names one record."""
        return f"{self.path} row {self.numbers[index]}"

    def digest(self) -> str:
        """SHA-256 of the records, so that a resumed run notices other data."""
        text = "\n".join(json.dumps(r, ensure_ascii=False, default=str) for r in self.records)
        return hashlib.sha256(text.encode()).hexdigest()


def read_table(path: str) -> Table:
    """All records of a file.

    Raises UserError for a file that cannot be read, an unknown suffix, a broken line or no record.
    """
    base, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(base)[1]
    if suffix not in SUFFIXES:
        raise UserError(f"{path} is no table that is read: give one of {', '.join(SUFFIXES)}")
    with unreadable_is_told(path):
        if suffix == ".parquet":
            records = pyarrow.parquet.read_table(path).to_pylist()
            numbers = list(range(1, len(records) + 1))
        else:
            with open_text(path) as file:
                text = _decoded(file.read(), path)
            records, numbers = _PARSERS[suffix](text, path)
    if not records:
        raise UserError(f"{path} holds no record")
    return Table(path, records, numbers)


def _decoded(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None


def _json_lines(text: str, path: str) -> tuple[list[Record], list[int]]:
    if text.lstrip().startswith("["):
        return _json(text, path)
    records, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records.append(object_in(line, f"{path} row {number}"))
            numbers.append(number)
    return records, numbers


def _json(text: str, path: str) -> tuple[list[Record], list[int]]:
    if _has_lines(text):
        return _json_lines(text, path)
    value = parsed(text, path)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
        if value and isinstance(value[0], dict) and "paragraphs" in value[0]:
            value = _questions(value, path)
    if not isinstance(value, list):
        raise UserError(f"{path} must hold a list of objects, or SQuAD's `data`")
    records = [_object(item, f"{path} row {n}") for n, item in enumerate(value, start=1)]
    return records, list(range(1, len(records) + 1))


def _has_lines(text: str) -> bool:
    """Whether the first line is a whole object and not the last one."""
    first, _, rest = text.strip().partition("\n")
    if not (first.startswith("{") and rest):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _questions(articles: list, path: str) -> list[Record]:
    """SQuAD's nesting (Rajpurkar et al. 2016, 2018) laid flat; CMRC 2018 has the same shape."""
    try:
        return [
            {
                "id": str(question["id"]),
                "context": paragraph["context"],
                "question": question["question"],
                "answers": question.get("answers", []),
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no SQuAD file: {error} is missing or misplaced") from None


def object_in(text: str, where: str) -> Record:
    """The record that a JSON text is, from a file, a pipe or a command line; raises UserError,
    naming `where`, for a text that is none."""
    return _object(parsed(text, where), where)


def parsed(text: str, where: str) -> Any:
    """The value of a JSON text; raises UserError, naming `where`, for a text that is none."""
    try:
        value = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair is no character, and no tokenizer takes it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object with named columns")
    return value


def _separated(delimiter: str) -> Any:
    def parse(text: str, path: str) -> tuple[list[Record], list[int]]:
        header, *body = _cells(text, path, delimiter) or [[]]
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path} has two columns called {twice!r}; rename one of them")
        records, numbers = [], []
        for number, row in enumerate(body, start=1):
            if row and len(row) != len(header):
                raise UserError(
                    f"{path} row {number} has {len(row)} columns, its header {len(header)} "
                    f"({', '.join(header)})"
                )
            if row:
                records.append(dict(zip(header, row)))
                numbers.append(number)
        return records, numbers

    return parse


def _cells(text: str, path: str, delimiter: str) -> list[list[str]]:
    """The rows of a separated file, an empty list for an empty line."""
    first = text.partition("\n")[0]
    if delimiter == "\t":
        lines = text.removesuffix("\n").split("\n")
        literal = [[_unquoted(cell) for cell in line.rstrip("\r").split("\t")] for line in lines]
        rows = [[] if row == [""] else row for row in literal]
        if all(len(row) in (0, len(rows[0])) for row in rows):
            return rows
    elif ";" in first and "," not in first:
        delimiter = ";"
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return list(reader)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not valid CSV: {error}") from None


def _unquoted(cell: str) -> str:
    """The content of a cell that is quoted as a whole; any other as it stands."""
    inner = cell[1:-1]
    whole = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else cell


def _columns(text: str, path: str) -> tuple[list[Record], list[int]]:
    """CoNLL columns: the first is the word, the last its tag (Tjong Kim Sang & De Meulder 2003)."""
    records: list[Record] = []
    rows: list[list[str]] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        line = line.strip(BLANKS)
        fields = re.split("\t" if "\t" in line else " +", line) if line else []
        document = fields[:1] == ["-DOCSTART-"]
        comment = not rows and line.startswith("# ") and "=" in line
        if fields and not document and not comment:
            if len(fields) < 2:
                raise UserError(f"{path} line {number} has one column; a word and a tag are needed")
            rows.append([field.strip(BLANKS) for field in fields])
        elif rows:
            records.append(_sentence(rows))
            rows = []
    return records, list(range(1, len(records) + 1))


def _sentence(rows: list[list[str]]) -> Record:
    """The record of a sentence's rows."""
    record: Record = {"tokens": [row[0] for row in rows], "tags": [row[-1] for row in rows]}
    width = len(rows[0])
    if width > 2 and all(len(row) == width for row in rows):
        record |= {f"column_{n}": list(column) for n, column in enumerate(zip(*rows), start=1)}
    return record


_PARSERS = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".conll": _columns,
    ".bio": _columns,
    ".iob": _columns,
    ".txt": _columns,
}
