"""A shard in S3-compatible storage: read like a local one, block by block through the node's cache.

The beginning of the Arrow file (schema, offsets' place), its end (footer), its document offsets
and, where there are any, the lengths of its sentences are kept in a sparse local file of the
shard's full size, which `Shard` opens and checks as if all were there; the tokens are a hole in it
and come from the cache. So bytes and order are those of the local file. Blocks are checked against
the CRC-32s in the manifest, which `ShardWriter` records.
"""

from __future__ import annotations

import hashlib
import os
import pathlib

import numpy as np
import pyarrow as pa

from nanolm.config.schema import CacheConfig
from nanolm.data.object_store import ObjectStore
from nanolm.data.shards.block_cache import HEAD_FILE, THREADS, Block, shared_cache
from nanolm.data.shards.shard_file import Shard, damaged
from nanolm.errors import UserError, require
from nanolm.files import full_disk_is_told, temporary_name

FETCHES = 6
"""Times that a block is fetched whose checksum is wrong."""


class RemoteShard(Shard):
    """A shard of which `offsets` is a view of a local file and `tokens` a `RemoteTokens`.

    entry: its manifest entry. Raises UserError for an entry without block checksums, an object of
    another size and whatever `Shard` refuses.
    """

    def __init__(self, store: ObjectStore, entry: dict, config: CacheConfig) -> None:
        self._source = (store, entry, config)
        self.blocks = RemoteBlocks(store, entry, config)
        head = self.blocks.cache.folder / entry["sha256"] / HEAD_FILE
        if not head.is_file():
            write_head(self.blocks, head)
        super().__init__(head)
        name = self.path = store.name(entry["file"])
        address, length = token_buffer(self._map, name)
        self.tokens = RemoteTokens(self.blocks, address, length, self.tokens.dtype)

    def __reduce__(self) -> tuple:
        return RemoteShard, self._source

    def windows(self, begins: np.ndarray, span: int) -> np.ndarray:
        """[len(begins), span]: the tokens from each place on; missing blocks come side by side."""
        self.expect(begins, span)
        rows = np.empty((len(begins), span), self.tokens.dtype)
        for row, begin in zip(rows, begins.tolist()):
            row[:] = self.tokens[begin : begin + span]
        return rows

    def expect(self, begins: np.ndarray, span: int, *, wait: bool = True) -> None:
        """Fetches the blocks of these stretches; with wait=False, in the background."""
        numbers: dict[int, None] = {}
        for begin in begins.tolist():
            numbers |= dict.fromkeys(self.tokens.block_numbers(begin, begin + span))
        self.blocks.expect(list(numbers), wait=wait)

    def sha256_and_tokens(self) -> tuple[str, np.ndarray]:
        """Everything read once more past the cache: the object's hash and its tokens."""
        return self.blocks.sha256(), self.tokens[:]


class RemoteTokens:
    """The token ids of a remote shard: has a length and a dtype, and slices give arrays."""

    def __init__(self, blocks: RemoteBlocks, address: int, length: int, dtype: np.dtype) -> None:
        self._blocks, self._address, self._length = blocks, address, length
        self.dtype = dtype

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, stretch: slice) -> np.ndarray:
        begin, end, _ = stretch.indices(self._length)
        size = self.dtype.itemsize
        data = self._blocks.read(self._address + begin * size, max(end - begin, 0) * size)
        return np.frombuffer(data, self.dtype)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype)

    def block_numbers(self, begin: int, end: int) -> range:
        """The blocks that hold these tokens."""
        size = self.dtype.itemsize
        end = min(end, self._length)
        return self._blocks.numbers(self._address + begin * size, (end - begin) * size)


class RemoteBlocks:
    """The bytes of one object, through the cache."""

    def __init__(self, store: ObjectStore, entry: dict, config: CacheConfig) -> None:
        self.store, self.file, self.size = store, entry["file"], entry["size"]
        self.content = entry["sha256"]
        sums = entry.get("blocks")
        if not sums:
            raise UserError(
                f"the manifest of {store.url} has no checksums of blocks (an older nanolm wrote "
                f"it), and reading from a bucket needs them; prepare the data again"
            )
        self.length = sums["bytes"]
        self.sums = [int(sums["crc32"][at : at + 8], 16) for at in range(0, len(sums["crc32"]), 8)]
        require(
            self.length > 0 and len(self.sums) == -(-self.size // self.length),
            f"the manifest of {store.url} has checksums that do not fit {self.file}; prepare the "
            f"data again",
        )
        self.cache = shared_cache(config, self.length)

    def numbers(self, begin: int, length: int) -> range:
        """The blocks that hold bytes [begin, begin + length)."""
        return range(begin // self.length, -(-(begin + length) // self.length))

    def expect(self, numbers: list[int], *, wait: bool) -> None:
        """Fetches these blocks, in parallel."""
        blocks = [self._block(number) for number in numbers]
        if wait:
            self.cache.get(blocks, self._fetch)
        else:
            for block in blocks:
                self.cache.prefetch(block, self._fetch)

    def read(self, begin: int, length: int) -> bytes:
        """Bytes [begin, begin + length) of the object."""
        numbers = self.numbers(begin, length)
        parts = []
        for number in numbers:
            if len(numbers) > 1:
                self.expect(list(range(number, min(number + THREADS, numbers.stop))), wait=False)
            first = max(begin - number * self.length, 0)
            last = min(begin + length - number * self.length, self.length)
            parts.append(self.cache.read(self._block(number), first, last - first, self._fetch))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def sha256(self) -> str:
        """Hex SHA-256 of all bytes, read from the bucket."""
        digest = hashlib.sha256()
        for number in range(len(self.sums)):
            digest.update(self._fetch(self._block(number)))
        return digest.hexdigest()

    def _block(self, number: int) -> Block:
        length = min(self.length, self.size - number * self.length)
        return Block(self.content, number, length, self.sums[number])

    def _fetch(self, block: Block) -> bytes:
        for _ in range(FETCHES):
            content = self.store.read(self.file, block.number * self.length, block.length)
            if block.is_whole(content):
                return content
        raise damaged(self.store.name(self.file), f"the checksum of block {block.number} differs")


def write_head(blocks: RemoteBlocks, head: pathlib.Path) -> None:
    """Writes the sparse file: first and last block, then all but the tokens, whose place they
    tell."""
    held = blocks.store.size(blocks.file)
    name = blocks.store.name(blocks.file)
    if held != blocks.size:
        raise damaged(name, f"{held} bytes instead of {blocks.size}")
    temporary = temporary_name(head)
    with full_disk_is_told(head):
        head.parent.mkdir(exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.truncate(blocks.size)
                for begin in (0, max(blocks.size - blocks.length, 0)):
                    length = min(blocks.length, blocks.size - begin)
                    os.pwrite(file.fileno(), blocks.read(begin, length), begin)
            with pa.memory_map(str(temporary)) as mapped:
                offsets, _, *sentences = buffer_places(mapped, name)
            kept = [offsets, *sentences]
            blocks.cache.reserve(sum(length for _, length in kept) + 2 * blocks.length)
            with open(temporary, "r+b") as file:
                for begin, length in kept:
                    for at in range(begin, begin + length, blocks.length):
                        part = blocks.read(at, min(blocks.length, begin + length - at))
                        os.pwrite(file.fileno(), part, at)
                os.fsync(file.fileno())
            temporary.replace(head)
        finally:
            temporary.unlink(missing_ok=True)


def token_buffer(mapped: pa.MemoryMappedFile, name: str) -> tuple[int, int]:
    """Where in the file the tokens stand, and how many there are."""
    begin, length = buffer_places(mapped, name)[1]
    mapped.seek(0)
    values = pa.ipc.open_file(mapped).get_batch(0).column(0).values
    return begin, length // values.type.byte_width


def buffer_places(mapped: pa.MemoryMappedFile, name: str) -> list[tuple[int, int]]:
    """(begin, length) in bytes, in the file, of the offsets, of the tokens, and of the two buffers
    of the sentences where there are any."""
    try:
        mapped.seek(0)
        base, size = mapped.read_buffer().address, mapped.size()
        mapped.seek(0)
        found = []
        for column in pa.ipc.open_file(mapped).get_batch(0).columns:
            width = column.values.type.byte_width
            found += [
                (column.buffers()[1].address - base, 4 * (len(column) + 1)),
                (column.values.buffers()[1].address - base, width * len(column.values)),
            ]
    except (pa.ArrowException, OSError, ValueError, AttributeError, IndexError) as error:
        raise damaged(name, f"it is no token shard: {error}") from error
    if any(begin < 0 or begin + length > size for begin, length in found):
        raise damaged(name, "its buffers do not lie in it")
    return found
