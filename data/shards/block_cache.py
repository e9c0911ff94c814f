"""A node's bounded cache of blocks of remote shards, shared by all ranks and loader workers.

    CACHE/size                        bytes that are taken, under a lock
    CACHE/<shard's SHA-256>/000017    one block: an atomic file, never changed
    CACHE/<shard's SHA-256>/lock      who downloads block n holds a lock on byte n
    CACHE/<shard's SHA-256>/head      what `remote_shard.py` keeps open; counted, never dropped

A block is checked against its checksum before it enters and again when a process first reads it, so
what a power cut or a bad disk left is fetched anew. Room is reserved before a block is written, so
the limit holds at every moment; the blocks that were not read for longest make room (a reader that
finds its block gone fetches it again).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import queue
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator

from nanolm.config.schema import CacheConfig
from nanolm.errors import UserError, require
from nanolm.files import full_disk_is_told, is_temporary, temporary_name

SIZE_FILE, LOCK_FILE, HEAD_FILE = "size", "lock", "head"
THREADS = 16
LEAST_BLOCKS = 2 * THREADS
"""A limit below so many blocks would drop what is on its way."""
FLOCK = "hhqqi0q"
"""Linux's `struct flock`: type, whence, start, length, pid."""
DISK_BLOCK = 512
"""Bytes of the unit in which `stat` counts what a file takes."""
EVICT_TO = 0.9
"""Share of the limit that is left after blocks were dropped: each sweep lists the whole cache."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of one object: where it lies, and what it must be."""

    store: str
    """Names the object's content: its SHA-256."""
    number: int
    length: int
    crc32: int

    @property
    def name(self) -> str:
        """Its file in the cache."""
        return f"{self.store}/{self.number:06d}"

    def is_whole(self, content: bytes) -> bool:
        """Whether these bytes are the block's."""
        return len(content) == self.length and zlib.crc32(content) == self.crc32


class BlockCache:
    """The cache in one folder of this node; threads share it, each process makes its own.

    fetch(block) of `get` and `prefetch` downloads a block. Raises UserError when the folder cannot
    be written, the disk is full, or what comes is not what the checksum says.
    """

    def __init__(self, config: CacheConfig, block_bytes: int) -> None:
        self.config = config
        self.folder = pathlib.Path(config.dir).expanduser()
        self.limit = round(config.gigabytes * 1e9)
        require(
            self.limit >= LEAST_BLOCKS * block_bytes,
            f"data.cache.gigabytes={config.gigabytes:g} must be at least "
            f"{LEAST_BLOCKS * block_bytes / 1e9:g} for blocks of {block_bytes:,} bytes",
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._size = os.open(self.folder / SIZE_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"data.cache.dir {self.folder} cannot be written ({error.strerror}); "
                f"name a folder on this node's disk"
            ) from error
        self._guard = threading.Lock()
        self._checked: set[str] = set()
        self._locks: dict[str, int] = {}
        self._coming: dict[str, concurrent.futures.Future] = {}
        # Daemons, not an executor: at exit nobody waits for what was only read ahead.
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=self._work, name="blocks", daemon=True).start()

    def read(self, block: Block, begin: int, length: int, fetch: Callable) -> bytes:
        """Bytes [begin, begin + length) of a block."""
        while True:
            self.get([block], fetch)
            with contextlib.suppress(FileNotFoundError):  # dropped since: fetch it again
                descriptor = os.open(self.folder / block.name, os.O_RDONLY)
                try:
                    os.utime(descriptor)
                    return os.pread(descriptor, length, begin)
                finally:
                    os.close(descriptor)

    def get(self, blocks: Iterable[Block], fetch: Callable) -> None:
        """Returns when every block is, or was a moment ago, in the cache."""
        coming = [future for block in blocks if (future := self.prefetch(block, fetch))]
        for future in coming:
            future.result()

    def prefetch(self, block: Block, fetch: Callable) -> concurrent.futures.Future | None:
        """Begins to fetch a block in the background; None when it is there."""
        with self._guard:
            if block.name in self._coming:
                return self._coming[block.name]
            if self._is_good(block):
                return None
            future = self._coming[block.name] = concurrent.futures.Future()
        self._tasks.put((future, block, fetch))
        return future

    def _work(self) -> None:
        while True:
            future, block, fetch = self._tasks.get()
            answer: BaseException | None = None
            try:
                self._bring(block, fetch)
            except BaseException as error:  # noqa: BLE001  (raised in the thread that asked)
                answer = error
            with self._guard:
                del self._coming[block.name]
            if answer is None:
                future.set_result(None)
            else:
                future.set_exception(answer)

    def _is_good(self, block: Block) -> bool:
        path = self.folder / block.name
        if block.name in self._checked:
            return path.exists()
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False
        if block.is_whole(content):
            self._checked.add(block.name)
            return True
        return False

    def _bring(self, block: Block, fetch: Callable[[Block], bytes]) -> None:
        """Downloads and stores a block, unless another process of this node did meanwhile."""
        path = self.folder / block.name
        with self._downloading(block):
            if self._is_good(block):
                return
            content = fetch(block)
            with full_disk_is_told(path):
                self.reserve(block.length)
                temporary = temporary_name(path)
                try:
                    temporary.write_bytes(content)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
            self._checked.add(block.name)

    @contextlib.contextmanager
    def _downloading(self, block: Block) -> Iterator[None]:
        """Inside, no other process of this node downloads the same block."""
        with self._guard:
            if block.store not in self._locks:
                (self.folder / block.store).mkdir(exist_ok=True)
                lock = self.folder / block.store / LOCK_FILE
                self._locks[block.store] = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            descriptor = self._locks[block.store]
        _lock_byte(descriptor, fcntl.F_WRLCK, block.number)
        try:
            yield
        finally:
            _lock_byte(descriptor, fcntl.F_UNLCK, block.number)

    def reserve(self, length: int) -> None:
        """Takes room for so many bytes, dropping what was not read for longest."""
        with self._guard:
            fcntl.flock(self._size, fcntl.LOCK_EX)
            try:
                taken = int(os.pread(self._size, 20, 0) or b"0")
                if taken + length > self.limit:
                    taken = self._evict(int(EVICT_TO * self.limit) - length)
                require(
                    taken + length <= self.limit,
                    f"data.cache.gigabytes={self.config.gigabytes:g} does not hold the document "
                    f"boundaries of the shards; raise it",
                )
                os.pwrite(self._size, f"{taken + length:020d}".encode(), 0)
            finally:
                fcntl.flock(self._size, fcntl.LOCK_UN)

    def _evict(self, most: int) -> int:
        """Drops blocks until at most so many bytes are held; returns how many are.

        Counts from the files themselves, so what a killed process reserved and never wrote is found
        here. Temporary files of living processes are few and count as theirs.
        """
        found, held = [], 0
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                if is_temporary(entry.name) and not _is_alive(entry.name):
                    os.unlink(entry.path)
                elif entry.name == HEAD_FILE:
                    held += entry.stat().st_blocks * DISK_BLOCK  # sparse
                elif entry.name != LOCK_FILE:
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        held += sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held <= most:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            held -= size
        return held

    def _entries(self) -> Iterator[os.DirEntry]:
        for folder in self.folder.iterdir():
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    yield from entries


def _lock_byte(descriptor: int, kind: int, number: int) -> None:
    """Takes or gives up the lock of one byte of a file, which belongs to the open file.

    A lock of the process (`lockf`) would be refused as a deadlock where two processes' threads wait
    for each other's blocks, though no thread ever holds two.
    """
    flock = struct.pack(FLOCK, kind, os.SEEK_SET, number, 1, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, flock)


def _is_alive(temporary: str) -> bool:
    return pathlib.Path(f"/proc/{temporary.rpartition('-')[2]}").exists()


def shared_cache(config: CacheConfig, block_bytes: int) -> BlockCache:
    """This process's cache of that configuration."""
    return _cache_of_process(config, block_bytes, os.getpid())


@functools.cache
def _cache_of_process(config: CacheConfig, block_bytes: int, process: int) -> BlockCache:
    del process  # a forked child has none of its parent's threads
    return BlockCache(config, block_bytes)
