"""Readers: documents out of one file, or out of a byte range or row group of it.

Text formats: .txt (documents as configured), .md and .py (one document a file), .jsonl and .json
(one object a line), each plain, .gz or .zst; and .parquet. Uncompressed files made of lines are cut
into byte ranges, so that several processes share one file: a range owns what begins in it.
No block held in memory is larger than 1 MiB (`RECORD_BYTES` for a line of JSON).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet

from nanolm.data.documents import blocks, lines, paragraphs
from nanolm.errors import UserError

RECORD_BYTES = 1 << 26
PROBE_BYTES = 1 << 20
LONG_LINE_BYTES = 400

TEXT_FORMATS = {".txt": "txt", ".md": "file", ".py": "file", ".jsonl": "json", ".json": "json"}
COMPRESSIONS = {".gz", ".zst"}
TXT_DOCUMENTS = ("auto", "file", "line", "paragraph")


def format_of(path: str) -> str | None:
    """txt, file, json or parquet by the name of a file; None for a format that is not read."""
    base, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(base)[1]
    return "parquet" if suffix == ".parquet" else TEXT_FORMATS.get(suffix)


@dataclasses.dataclass(frozen=True)
class FilePiece:
    """Documents of one file: the bytes [begin, end), or those row groups of a parquet file.

    kind: file, line, paragraph, json or parquet. `size` is in bytes on disk.
    """

    path: str
    kind: str
    begin: int
    end: int
    size: int
    text_field: str

    @property
    def label(self) -> str:
        """What error messages call it."""
        return self.path

    def identity(self) -> list:
        """Path, range, and what the file looked like."""
        status = os.stat(self.path)
        return [self.path, self.kind, self.begin, self.end, status.st_size, status.st_mtime_ns]

    def documents(self, counts: Counter) -> Iterator[bytes]:
        """The documents in file order; raises UserError naming the file when it cannot be read."""
        with unreadable_is_told(self.path):
            if self.kind == "parquet":
                yield from self._rows(counts)
                return
            with open_text(self.path) as file:
                if self.kind == "json":
                    yield from self._records(file, counts)
                elif self.kind == "file":
                    yield from blocks(file, counts)
                elif self.kind == "line":
                    yield from lines(file, self.begin, self.end, counts)
                else:
                    yield from paragraphs(file, self.begin, self.end, counts)

    def _records(self, file: IO[bytes], counts: Counter) -> Iterator[str]:
        first = self.begin == 0
        for line in lines(file, self.begin, self.end, counts, limit=RECORD_BYTES):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # UnicodeDecodeError is one, too
                counts["dropped/not a JSON object"] += 1
                continue
            if not isinstance(record, dict):
                counts["dropped/not a JSON object"] += 1
                continue
            text = record.get(self.text_field)
            if first and text is None:
                raise UserError(no_field(self.path, self.text_field, list(record)))
            first = False
            if isinstance(text, str):
                yield text
            else:
                counts[f"dropped/no text in field {self.text_field}"] += 1

    def _rows(self, counts: Counter) -> Iterator[str | bytes]:
        file = pyarrow.parquet.ParquetFile(self.path)
        if self.text_field not in file.schema_arrow.names:
            raise UserError(no_field(self.path, self.text_field, file.schema_arrow.names))
        groups = range(self.begin, self.end)
        for batch in file.iter_batches(256, row_groups=groups, columns=[self.text_field]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str | bytes):
                    yield text
                else:
                    counts[f"dropped/no text in field {self.text_field}"] += 1


def no_field(path: str, field: str, fields: list[str]) -> str:
    """The sentence for records without the text field."""
    return f"{path} has no field {field!r}; choose --text_field from {', '.join(fields)}"


def work_bytes(total: int) -> int:
    """How large a piece of work should be: 1/64 of the whole, but 1 to 64 MiB."""
    return min(max(total // 64, 1 << 20), 1 << 26)


def file_pieces(path: str, *, text_field: str, txt_documents: str) -> Iterator[FilePiece]:
    """Cut one file into pieces; compressed files and single documents stay whole."""
    with unreadable_is_told(path):
        size = os.path.getsize(path)
        kind = format_of(path)
        if kind == "parquet":
            metadata = pyarrow.parquet.read_metadata(path)
            for group in range(metadata.num_row_groups):
                weight = metadata.row_group(group).total_byte_size
                yield FilePiece(path, kind, group, group + 1, weight, text_field)
            return
        if kind == "txt":
            kind = guess_documents(path) if txt_documents == "auto" else txt_documents
    whole = kind == "file" or os.path.splitext(path)[1].lower() in COMPRESSIONS
    step = size if whole else work_bytes(size)
    for begin in range(0, size, max(1, step)):
        end = min(size, begin + step)
        # A compressed file is longer than its size on disk: it is read to its end.
        yield FilePiece(path, kind, begin, 1 << 62 if whole else end, end - begin, text_field)


def guess_documents(path: str) -> str:
    """What a document is in a .txt file, judged by its first MiB.

    A file up to 1 MiB is one document. In a larger one, lines of 400 bytes or more on average are
    documents; else paragraphs are (text between blank lines), if there are any; else lines.
    """
    with open_text(path) as file:
        head = file.read(PROBE_BYTES + 1)
    if len(head) <= PROBE_BYTES:
        return "file"
    filled = [line for line in head.split(b"\n") if line.strip()]
    if not filled or len(head) / len(filled) >= LONG_LINE_BYTES:
        return "line"
    blank = head.replace(b"\r", b"").count(b"\n\n")
    return "paragraph" if blank > 1 else "line"


def open_text(path: str) -> IO[bytes]:
    """Open a plain, .gz or .zst file for reading bytes."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        return io.BufferedReader(ZstdStream(path), 1 << 18)
    return open(path, "rb")


class ZstdStream(io.RawIOBase):
    """A zstd file as a raw stream, through the decoder that pyarrow carries."""

    def __init__(self, path: str) -> None:
        self._stream = pa.CompressedInputStream(pa.OSFile(path), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextlib.contextmanager
def unreadable_is_told(path: str) -> Iterator[None]:
    """Turn what a damaged or forbidden input file raises into a UserError that names it."""
    try:
        yield
    except (pa.ArrowInvalid, EOFError, OSError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"cannot read {path} ({reason}); repair it or leave it out of the sources"
        ) from error
