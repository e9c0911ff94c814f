"""One shard: token ids in an Arrow IPC file, read through the memory map without a copy.

A shard holds one record batch with one column `tokens: list<uint16|uint32>`, one entry a document,
each document ending with eos. The column's values buffer *is* the flat token stream; its offsets
keep where documents begin. Training reads these two buffers as numpy views and nothing else, unless
rows are made of sentences: `prepare --sentences true` adds a column `sentences: list<int32>`, the
tokens in each sentence of a document.
"""

from __future__ import annotations

import os
import pathlib
import zlib
from collections.abc import Iterable
from typing import Self

import numpy as np
import pyarrow as pa

from nanolm.errors import UserError
from nanolm.files import AtomicFile, file_sha256

FORMAT_VERSION = 1
MAX_SHARD_TOKENS = (1 << 31) - 1
COUNTED_TOKENS = 1 << 22
BLOCK_BYTES = 1 << 20
"""What a shard in a bucket is read by; each block's CRC-32 stands in the manifest."""
# The metadata keys that are whole numbers; the others are words.
COUNTS = ("format_version", "vocab_size", "tokens", "documents", "bytes")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type on disk that holds every id: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ShardWriter:
    """Writes one shard atomically.

    >>> with ShardWriter(path, tokens=N, vocab_size=V, tokenizer_hash=h, source="wiki") as writer:
    ...     writer.write(tokens, lengths, text_bytes)

    `write` may be called several times: tokens [n] of whole documents, lengths [d] in tokens with
    eos, text_bytes = UTF-8 bytes of those documents, sentences [s] in tokens, for all documents or
    for none. N is the number of tokens in all, so that they stand in memory once. After the block,
    `info` is the shard's entry for a manifest. Raises UserError when the disk is full, ValueError
    when more or fewer than N tokens were written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        tokens: int,
        vocab_size: int,
        tokenizer_hash: str,
        source: str = "",
    ) -> None:
        if tokens > MAX_SHARD_TOKENS:
            raise ValueError(f"{tokens} tokens do not fit one shard")
        self.path = pathlib.Path(path)
        self.vocab_size = vocab_size
        self.tokenizer_hash = tokenizer_hash
        self.source = source
        self.info: dict = {}
        self._values = np.empty(tokens, token_dtype(vocab_size))
        self._filled = 0
        self._lengths: list[np.ndarray] = []
        self._sentences: list[np.ndarray] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def write(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        text_bytes: int,
        sentences: np.ndarray | None = None,
    ) -> None:
        """Append whole documents; raises ValueError when ids or lengths cannot be right."""
        if int(np.sum(lengths)) != len(tokens) or np.any(np.asarray(lengths) < 1):
            raise ValueError(f"document lengths do not add up to {len(tokens)} tokens")
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            raise ValueError(f"token id {tokens.max()} is outside the vocabulary")
        end = self._filled + len(tokens)
        if end > len(self._values):
            raise ValueError(f"{end} tokens where {len(self._values)} were announced")
        self._values[self._filled : end] = tokens
        self._filled = end
        self._lengths.append(lengths)
        if sentences is not None:
            self._sentences.append(sentences)
        self._bytes += text_bytes

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._save()

    def _save(self) -> None:
        values = self._values
        if self._filled < len(values):
            raise ValueError(f"{self._filled} tokens where {len(values)} were announced")
        offsets = np.zeros(1 + sum(map(len, self._lengths)), np.int32)
        np.cumsum(np.concatenate([np.empty(0, np.int64), *self._lengths]), out=offsets[1:])
        metadata = {
            "format_version": FORMAT_VERSION,
            "tokenizer_hash": self.tokenizer_hash,
            "vocab_size": self.vocab_size,
            "tokens": len(values),
            "documents": len(offsets) - 1,
            "bytes": self._bytes,
            "source": self.source,
        }
        columns = {"tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))}
        if self._sentences:
            columns["sentences"] = sentence_column(np.concatenate(self._sentences), offsets)
        schema = pa.schema(
            [pa.field(name, column.type) for name, column in columns.items()],
            metadata={key: str(value) for key, value in metadata.items()},
        )
        with AtomicFile(self.path) as file, pa.ipc.new_file(file, schema) as sink:
            sink.write_batch(pa.record_batch([*columns.values()], schema=schema))
        self.info = {
            "file": self.path.name,
            "sha256": file.sha256,
            "size": file.size,
            "tokens": len(values),
            "documents": len(offsets) - 1,
            "bytes": self._bytes,
            "blocks": block_checksums(self.path),
        }


class Shard:
    """An open shard: `tokens` [n] uint16|uint32 and `offsets` [documents + 1] int32, both views of
    the memory map; document d is `tokens[offsets[d]:offsets[d + 1]]`. `sentences` int32, also a
    view: the tokens in each sentence, or None. `metadata` is what the writer recorded. Raises
    UserError when the file is missing or its structure is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path: pathlib.Path | str = pathlib.Path(path)
        self._windows: dict[int, np.ndarray] = {}
        try:
            self._map = pa.memory_map(str(self.path))
            batch = _only_batch(pa.ipc.open_file(self._map))
            self.metadata = _read_metadata(batch.schema)
            column = batch.column(0)
            column.validate()  # what a stranger's file claims of its buffers
            self.tokens = column.values.to_numpy(zero_copy_only=True)
            self.offsets = column.offsets.to_numpy(zero_copy_only=True)
            self.sentences = _sentences(batch)
        except FileNotFoundError as error:
            raise UserError(
                f"shard {self.path} is missing; restore it or prepare the data again"
            ) from error
        except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError) as error:
            raise damaged(self.path, f"it is no token shard: {error}") from error
        self._check_structure()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __reduce__(self) -> tuple:
        return (Shard, (self.path,))

    def windows(self, begins: np.ndarray, span: int) -> np.ndarray:
        """[len(begins), span]: the tokens from each place on; all must end in this shard."""
        if span not in self._windows:  # overlapping views, which take no memory
            self._windows[span] = np.lib.stride_tricks.sliding_window_view(self.tokens, span)
        return self._windows[span][begins]

    def expect(self, begins: np.ndarray, span: int, *, wait: bool = True) -> None:
        """Told which stretches will be read: a local file has nothing to do for them."""

    def sha256_and_tokens(self) -> tuple[str, np.ndarray]:
        """The file's hash and its tokens."""
        return file_sha256(self.path), self.tokens

    def sentence_starts(self) -> np.ndarray:
        """int64: where sentences begin among the tokens, documents' first ones included.

        Raises UserError when the shard was written without them, or they cannot be its own.
        """
        if self.sentences is None:
            raise UserError(
                f"shard {self.path} does not say where sentences begin, which data.rows=sentences "
                f"asks; prepare the data into another folder with --sentences true"
            )
        bounds = np.zeros(1 + len(self.sentences), np.int64)
        np.cumsum(self.sentences, out=bounds[1:])
        if np.any(np.diff(bounds) < 1) or bounds[-1] != len(self.tokens):
            raise damaged(self.path, "its sentences do not add up to its tokens")
        found = bounds.searchsorted(self.offsets)
        if np.any(bounds.take(found, mode="clip") != self.offsets):
            raise damaged(self.path, "a document begins inside a sentence")
        return bounds[:-1]

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, eos included: a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def _check_structure(self) -> None:
        version = self.metadata["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"shard {self.path} has format {version}, this version reads {FORMAT_VERSION}; "
                f"prepare the data again"
            )
        if self.tokens.dtype != token_dtype(self.metadata["vocab_size"]):
            raise damaged(self.path, f"ids are {self.tokens.dtype}")
        ends = (self.offsets[0], self.offsets[-1])
        if ends != (0, len(self.tokens)) or len(self.tokens) != self.metadata["tokens"]:
            raise damaged(self.path, "its document boundaries do not match its tokens")
        if len(self) != self.metadata["documents"]:
            raise damaged(self.path, "its number of documents is not the one recorded")


def sentence_column(lengths: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """Sentence lengths [s] in tokens as one list a document; offsets [documents + 1] in tokens."""
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    places = ends.searchsorted(offsets)
    if np.any(ends.take(places, mode="clip") != offsets) or ends[-1] != offsets[-1]:
        raise ValueError("sentences do not add up to their documents")
    values = pa.array(lengths.astype(np.int32))
    return pa.ListArray.from_arrays(pa.array(places.astype(np.int32)), values)


def _sentences(batch: pa.RecordBatch) -> np.ndarray | None:
    """The second column's values, as a view; None for a shard of one column."""
    if batch.num_columns == 1:
        return None
    column = batch.column("sentences")
    column.validate()
    if column.values.type != pa.int32():
        raise ValueError(f"its sentences are {column.values.type}")
    return column.values.to_numpy(zero_copy_only=True)


def block_checksums(path: pathlib.Path) -> dict:
    """{bytes: length of a block, crc32: eight hex digits for each, joined} of a file."""
    sums = []
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            sums.append(f"{zlib.crc32(block):08x}")
    return {"bytes": BLOCK_BYTES, "crc32": "".join(sums)}


def damaged(path: pathlib.Path | str, reason: str) -> UserError:
    """The sentence for a shard that cannot be trusted."""
    return UserError(f"shard {path} is damaged ({reason}); restore it or prepare the data again")


def _only_batch(reader: pa.ipc.RecordBatchFileReader) -> pa.RecordBatch:
    if reader.num_record_batches != 1:
        raise ValueError(f"{reader.num_record_batches} record batches instead of one")
    return reader.get_batch(0)


def _read_metadata(schema: pa.Schema) -> dict:
    words = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    return {**words, **{key: int(words[key]) for key in COUNTS}}


def check_ids(shard: Shard, tokens: np.ndarray) -> None:
    """Read every id and boundary of a shard; raises UserError at the first that is impossible."""
    size = shard.metadata["vocab_size"]
    if len(tokens) and int(tokens.max()) >= size:
        raise damaged(shard.path, f"token id {tokens.max()} with a vocabulary of {size}")
    if np.any(np.diff(shard.offsets) < 1):
        raise damaged(shard.path, "document boundaries do not increase")


def count_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs: int64[V]. In blocks, as bincount copies its input to int64."""
    counts = np.zeros(vocab_size, np.int64)
    for begin in range(0, len(tokens), COUNTED_TOKENS):
        counts += np.bincount(tokens[begin : begin + COUNTED_TOKENS], minlength=vocab_size)
    return counts


def total(shards: Iterable[dict], key: str) -> int:
    """Sum one count over manifest entries of shards."""
    return sum(shard[key] for shard in shards)
