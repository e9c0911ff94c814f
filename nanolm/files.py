"""Files that are either whole or absent: written under a temporary name, synced, then renamed.

Everything that `prepare` leaves on disk goes through `AtomicFile`: a process killed at any moment
leaves no file that looks finished and is not, and a full disk is told in one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Self

from nanolm.errors import UserError

TEMPORARY_SUFFIX = ".partial"
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
READ_BLOCK = 1 << 20


class AtomicFile:
    """A binary file that appears at `path` only when its `with` block ends without an exception.

    Counts bytes and their SHA-256 while they pass (`size`, `sha256`). Raises UserError when the
    disk is full or a limit on file sizes is hit.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path)
        self.temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        self.size = 0
        self._digest = hashlib.sha256()
        self.closed = True

    def __enter__(self) -> Self:
        with self._disk_errors():
            self._file = open(self.temporary, "wb")
        self.closed = False
        return self

    def write(self, block: bytes) -> int:
        """Append bytes (anything with the buffer protocol)."""
        view = memoryview(block)
        with self._disk_errors():
            self._file.write(view)
        self._digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.closed = True
        try:
            if kind is None:
                with self._disk_errors():
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    os.replace(self.temporary, self.path)
                    sync_directory(self.path.parent)
        finally:
            # Closing flushes what a full disk refused once already; that error is known by now.
            with contextlib.suppress(OSError):
                self._file.close()
            self.temporary.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes written so far."""
        return self._digest.hexdigest()

    # pyarrow asks a Python file for these.
    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        with self._disk_errors():
            self._file.flush()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        with full_disk_is_told(self.path):
            yield


@contextlib.contextmanager
def full_disk_is_told(path: str | os.PathLike) -> Iterator[None]:
    """Turn "no space left" into a UserError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(
            f"cannot write {path}: {os.strerror(error.errno)}; free some space and run the same "
            f"command again, finished parts are kept"
        ) from error


def sync_directory(path: pathlib.Path) -> None:
    """Make renames inside a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON document atomically; equal values give equal bytes."""
    with AtomicFile(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def remove_leftovers(directory: pathlib.Path) -> None:
    """Delete temporary files that a killed process left behind."""
    for file in directory.rglob(f"*{TEMPORARY_SUFFIX}"):
        file.unlink(missing_ok=True)
