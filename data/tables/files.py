"""Tables of labelled examples: one file becomes a list of records, whatever its format.

    .jsonl            one JSON object a line               .json   a list of objects, or SQuAD
    .csv .tsv         a header line, then rows             .parquet
    .conll .bio .iob  one word a line, its tag in the last column, an empty line after a sentence

all but Parquet also .gz or .zst. SQuAD files (v1.1 and v2) become one record per question with
`id`, `context`, `question` and `answers`; column files one record per sentence with `tokens` and
`tags`. This is where a fine-tuning batch begins: file -> records -> items
(`nanolm.finetune.splits`) -> rows.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
from typing import Any

import pyarrow.parquet

from nanolm.data.readers import COMPRESSIONS, open_text, unreadable_is_told
from nanolm.errors import UserError

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".conll", ".bio", ".iob")


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
        """The columns of the first record."""
        return list(self.records[0]) if self.records else []

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
    records, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records.append(_object(_parsed(line, f"{path} row {number}"), f"{path} row {number}"))
            numbers.append(number)
    return records, numbers


def _json(text: str, path: str) -> tuple[list[Record], list[int]]:
    value = _parsed(text, path)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
        if value and isinstance(value[0], dict) and "paragraphs" in value[0]:
            value = _questions(value, path)
    if not isinstance(value, list):
        raise UserError(f"{path} must hold a list of objects, or SQuAD's `data`")
    records = [_object(item, f"{path} row {n}") for n, item in enumerate(value, start=1)]
    return records, list(range(1, len(records) + 1))


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


def _parsed(text: str, where: str) -> Any:
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
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            header, *body = list(rows) or [[]]
        except csv.Error as error:
            raise UserError(f"{path} line {rows.line_num} is not valid CSV: {error}") from None
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


def _columns(text: str, path: str) -> tuple[list[Record], list[int]]:
    """CoNLL columns: the first is the word, the last its tag (Tjong Kim Sang & De Meulder 2003)."""
    records: list[Record] = []
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        document = fields[:1] == ["-DOCSTART-"]
        comment = not tokens and line.startswith("# ") and "=" in line
        if fields and line.strip() and not document and not comment:
            if len(fields) < 2:
                raise UserError(f"{path} line {number} has one column; a word and a tag are needed")
            tokens.append(fields[0])
            tags.append(fields[-1].strip())
        elif tokens:
            records.append({"tokens": tokens, "tags": tags})
            tokens, tags = [], []
    return records, list(range(1, len(records) + 1))


_PARSERS = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".conll": _columns,
    ".bio": _columns,
    ".iob": _columns,
}
