"""The spool: cleaned documents of one unit of work, on disk between two phases of `prepare`.

A unit is a run of consecutive pieces that one process handles at a time. Ingesting it writes
`NAME.text` (Arrow, zstd: text and digest of every document), `NAME.keys.npy` (digests sorted, for
de-duplication) and, last of all, `NAME.json` (counts): a unit with its JSON is finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanolm.data.documents import bounded
from nanolm.data.prepare.clean import CleaningOptions, clean
from nanolm.data.prepare.sources import Piece
from nanolm.data.prepare.split import hash_range
from nanolm.errors import UserError
from nanolm.files import AtomicFile, write_json

BATCH_BYTES = 1 << 21
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4"), ("bytes", "<u4")])
SCHEMA = pa.schema([("text", pa.string()), ("digest", pa.binary(16))])


@dataclasses.dataclass(frozen=True)
class Unit:
    """A run of consecutive pieces, and the stem of the files that belong to it."""

    index: int
    stem: pathlib.Path
    pieces: tuple[Piece, ...]
    size: int

    def path(self, suffix: str) -> pathlib.Path:
        """The unit's file with that suffix."""
        return self.stem.with_name(self.stem.name + suffix)


def read_unit_info(unit: Unit) -> dict | None:
    """The counts of a finished unit; None when it is still to be done."""
    path = unit.path(".json")
    return json.loads(path.read_bytes()) if path.exists() else None


def ingest(unit: Unit, options: CleaningOptions, seed: int) -> dict:
    """Read, clean and spool one unit; returns its counts. Memory: one batch and the unit's keys.

    Raises UserError, naming the piece, for what cannot be read or is refused.
    """
    counts: Counter = Counter()
    keys: list[np.ndarray] = []
    written = 0
    with AtomicFile(unit.path(".text")) as file:
        codec = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1))
        with pa.ipc.new_file(file, SCHEMA, options=codec) as sink:
            for texts in _batches(unit, options, counts):
                encoded = [text.encode() for text in texts]
                digests = [hashlib.blake2b(text, digest_size=16).digest() for text in encoded]
                column = pa.array(encoded, pa.binary()).cast(pa.string())
                sink.write_batch(
                    pa.record_batch([column, pa.array(digests, pa.binary(16))], schema=SCHEMA)
                )
                batch_keys = np.empty(len(texts), KEY)
                batch_keys["high"], batch_keys["low"] = split_digests(digests)
                batch_keys["document"] = np.arange(written, written + len(texts))
                batch_keys["bytes"] = [len(text) for text in encoded]
                keys.append(batch_keys)
                written += len(texts)
    table = np.concatenate([np.empty(0, KEY), *keys])
    table = table[np.lexsort((table["document"], table["low"], table["high"]))]
    with AtomicFile(unit.path(".keys.npy")) as file:
        np.lib.format.write_array(file, table)
    info = {
        "documents": written,
        "bytes": int(table["bytes"].sum(dtype=np.int64)),
        "counts": dict(sorted(counts.items())),
        "hash_range": hash_range(table["high"], seed),
    }
    write_json(unit.path(".json"), info)
    return info


def _batches(unit: Unit, options: CleaningOptions, counts: Counter) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for text in _cleaned(unit, options, counts):
        texts.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _cleaned(unit: Unit, options: CleaningOptions, counts: Counter) -> Iterator[str]:
    for piece in unit.pieces:
        for raw in piece.documents(counts):
            for part in bounded(raw, counts):
                try:
                    text = clean(part, options, counts)
                except UserError as error:
                    raise UserError(f"{piece.label}: {error}") from error
                if text is not None:
                    yield text


def split_digests(digests: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Digests of 16 bytes as two uint64 arrays [n]: high and low halves."""
    pairs = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


@dataclasses.dataclass(frozen=True)
class SpoolBatch:
    """Consecutive documents of a unit: number of the first, texts, high digest halves uint64[n],
    and UTF-8 sizes int32[n]."""

    first: int
    texts: list[str]
    digests: np.ndarray
    sizes: np.ndarray


def read_spool(unit: Unit) -> Iterator[SpoolBatch]:
    """The documents of a unit in order, a batch at a time."""
    first = 0
    with pa.memory_map(str(unit.path(".text"))) as source:
        reader = pa.ipc.open_file(source)
        for index in range(reader.num_record_batches):
            texts, digests = reader.get_batch(index).columns
            halves = np.frombuffer(digests.buffers()[1], "<u8").reshape(-1, 2)
            yield SpoolBatch(
                first=first,
                texts=texts.to_pylist(),
                digests=halves[: len(texts), 0],
                sizes=pc.binary_length(texts).to_numpy(),
            )
            first += len(texts)
