"""Readers: documents out of one file, or out of a byte range or row group of it.

Text formats: .txt (documents as configured), .md and .py (one document a file), .jsonl, .ndjson and
.json (one object a line; .json also an array of objects), each plain, .gz, .zst, .xz or .bz2; and
.parquet. What a file is (its encoding, no text at all, its kind of JSON) is decided once, before
any piece of it. Uncompressed UTF-8 files made of lines are cut into byte ranges, so that several
processes share one file: a range owns what begins in it.
No block held in memory is larger than 1 MiB (`RECORD_BYTES` for a record of JSON).
"""

from __future__ import annotations

import contextlib
import dataclasses
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet

from nanolm.data import json_records
from nanolm.data.documents import blocks, lines, paragraphs
from nanolm.data.json_records import RECORD_BYTES
from nanolm.data.text_files import (
    AUTO,
    COMPRESSIONS,
    PROBE_BYTES,
    UTF8,
    encoding_of,
    holds_nul,
    open_text,
    recoded_head,
    unmarked_encoding,
)
from nanolm.errors import UserError

LONG_LINE_BYTES = 400

TEXT_FORMATS = {
    ".txt": "txt",
    ".md": "file",
    ".py": "file",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
NO_TEXT = "no text"


class NoFieldError(UserError):
    """No record in the beginning of a file has the text field."""


def suffixes(path: str) -> tuple[str, str]:
    """(what a file is, what it is compressed with) by its name, in lower case; "" for neither."""
    base, suffix = os.path.splitext(os.path.basename(path).lower())
    return (os.path.splitext(base)[1], suffix) if suffix in COMPRESSIONS else (suffix, "")


def format_of(path: str) -> str | None:
    """txt, file, json or parquet by the name of a file; None for a format that is not read."""
    suffix, compression = suffixes(path)
    if suffix == ".parquet":
        return None if compression else "parquet"
    return TEXT_FORMATS.get(suffix)


@dataclasses.dataclass(frozen=True)
class FilePiece:
    """Documents of one file: the bytes [begin, end), or those row groups of a parquet file.

    kind: file, line, paragraph, json (one record a line), json values (an array, or records of
    several lines), parquet, or no text. `size` is in bytes on disk. A file of no text has one
    piece, which counts it under `dropped`.
    """

    path: str
    kind: str
    begin: int
    end: int
    size: int
    text_field: str
    encoding: str = UTF8
    dropped: str = ""

    @property
    def label(self) -> str:
        """What error messages call it."""
        return self.path

    def identity(self) -> list:
        """Path, range, and what the file looked like."""
        status = os.stat(self.path)
        return [self.path, self.kind, self.begin, self.end, status.st_size, status.st_mtime_ns]

    def documents(self, counts: Counter) -> Iterator[bytes | str]:
        """The documents in file order; raises UserError naming the file when it cannot be read."""
        if self.kind == NO_TEXT:
            counts[f"dropped/{self.dropped}"] += 1
            return
        with unreadable_is_told(self.path):
            if self.kind == "parquet":
                yield from self._rows(counts)
                return
            with open_text(self.path, self.encoding) as file:
                if self.kind in ("json", "json values"):
                    yield from self._texts(file, counts)
                elif self.kind == "file":
                    yield from blocks(file, counts)
                elif self.kind == "line":
                    yield from lines(file, self.begin, self.end, counts)
                else:
                    yield from paragraphs(file, self.begin, self.end, counts)

    def _texts(self, file: IO[bytes], counts: Counter) -> Iterator[str]:
        for record in self._records(file, counts):
            text = record.get(self.text_field) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield text
            elif isinstance(record, dict):
                counts[f"dropped/no text in field {self.text_field}"] += 1
            else:
                counts["dropped/not a JSON object"] += 1

    def _records(self, file: IO[bytes], counts: Counter) -> Iterator[Any]:
        if self.kind == "json":
            found = lines(file, self.begin, self.end, counts, limit=RECORD_BYTES)
            yield from map(json_records.parsed, found)
            return
        number = 0
        try:
            for record in json_records.values(file):
                number += 1
                yield record
        except ValueError as error:
            raise UserError(
                f"cannot read {self.path}: no JSON after record {number} ({error}); repair it, or "
                f"leave it out with --exclude {os.path.basename(self.path)}"
            ) from error

    def _rows(self, counts: Counter) -> Iterator[str | bytes]:
        file = pyarrow.parquet.ParquetFile(self.path)
        groups = range(self.begin, self.end)
        for batch in file.iter_batches(256, row_groups=groups, columns=[self.text_field]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str | bytes):
                    yield text
                else:
                    counts[f"dropped/no text in field {self.text_field}"] += 1


def no_field(path: str, field: str, fields: list[str], instead: str = "") -> str:
    """The sentence for records without the text field, or with something `instead` of texts in it;
    `fields` are those that there are to choose from."""
    has = (
        f"{path} has {instead} in field {field!r}" if instead else f"{path} has no field {field!r}"
    )
    other = f"choose --text_field from {', '.join(fields)}" if fields else "none of it is text"
    return f"{has}; {other}"


def work_bytes(total: int) -> int:
    """How large a piece of work should be: 1/64 of the whole, but 1 to 64 MiB."""
    return min(max(total // 64, 1 << 20), 1 << 26)


def file_pieces(
    path: str, *, text_field: str, txt_documents: str, encoding: str = AUTO
) -> Iterator[FilePiece]:
    """Cut one file into pieces; files that are compressed, recoded or one document stay whole.

    Raises NoFieldError when its records have no such text field.
    """
    with unreadable_is_told(path):
        size = os.path.getsize(path)
        kind = format_of(path)
        if kind == "parquet":
            yield from _row_groups(path, text_field)
            return
        head = _head(path)
    found = encoding_of(head, encoding)
    no_text_at_all = holds_nul(head, found)
    if no_text_at_all and kind == "json":
        # Records are judged one by one: a NUL in one of them, or behind the last, spoils no other.
        no_text_at_all = not json_records.fields_in(recoded_head(head, found), by_line=True)
    if no_text_at_all:
        yield FilePiece(path, NO_TEXT, 0, size, size, text_field, dropped=no_text(head))
        return
    head, longer = recoded_head(head, found), len(head) > PROBE_BYTES
    if kind == "txt":
        kind = guess_documents(head, longer) if txt_documents == "auto" else txt_documents
    elif kind == "json":
        by_line = suffixes(path)[0] != ".json" or json_records.is_lines(head)
        fields = json_records.fields_in(head, by_line=by_line)
        if fields and text_field not in fields:
            raise NoFieldError(no_field(path, text_field, fields))
        kind = "json" if by_line else "json values"
    whole = kind in ("file", "json values") or found != UTF8 or bool(suffixes(path)[1])
    step = size if whole else work_bytes(size)
    for begin in range(0, size, max(1, step)):
        end = min(size, begin + step)
        # A compressed file is longer than its size on disk: it is read to its end.
        last = 1 << 62 if whole else end
        yield FilePiece(path, cast(str, kind), begin, last, end - begin, text_field, found)


def _row_groups(path: str, text_field: str) -> Iterator[FilePiece]:
    metadata = pyarrow.parquet.read_metadata(path)
    kinds = {field.name: field.type for field in metadata.schema.to_arrow_schema()}
    texts = [name for name, kind in kinds.items() if is_text(kind)]
    if text_field not in kinds:
        raise NoFieldError(no_field(path, text_field, texts))
    if text_field not in texts:
        raise NoFieldError(no_field(path, text_field, texts, f"{kinds[text_field]}, no text,"))
    for group in range(metadata.num_row_groups):
        weight = metadata.row_group(group).total_byte_size
        yield FilePiece(path, "parquet", group, group + 1, weight, text_field)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts (or nothing)."""
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind)
        for test in (
            *(types.is_string, types.is_large_string, types.is_string_view),
            *(types.is_binary, types.is_large_binary, types.is_binary_view),
            *(types.is_fixed_size_binary, types.is_null),
        )
    )


def _head(path: str) -> bytes:
    with open_text(path) as file:
        return file.read(PROBE_BYTES + 1)


def no_text(head: bytes) -> str:
    """Why a file with NUL characters is dropped, with the remedy if there is one."""
    unmarked = unmarked_encoding(head)
    if unmarked is None:
        return "binary file"
    name = unmarked.upper().removesuffix("-LE").removesuffix("-BE")
    return f"file in {name} without a byte-order mark (read it with --encoding {unmarked})"


def guess_documents(head: bytes, longer: bool) -> str:
    """What a document is in a .txt file, judged by its first MiB and whether it is longer.

    A file up to 1 MiB is one document. In a larger one, lines of 400 bytes or more on average are
    documents; else paragraphs are (text between blank lines), if there are any; else lines.
    """
    if not longer:
        return "file"
    filled = [line for line in head.split(b"\n") if line.strip()]
    if not filled or len(head) / len(filled) >= LONG_LINE_BYTES:
        return "line"
    blank = head.replace(b"\r", b"").count(b"\n\n")
    return "paragraph" if blank > 1 else "line"


@contextlib.contextmanager
def unreadable_is_told(path: str) -> Iterator[None]:
    """Turn what a damaged or forbidden input file raises into a UserError that names it."""
    try:
        yield
    except (pa.ArrowInvalid, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"cannot read {path} ({reason}); repair it or leave it out of the sources"
        ) from error
