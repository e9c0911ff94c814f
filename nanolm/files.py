"""Files that are either whole or absent: written under a temporary name, synced, then renamed.

Whatever nanolm leaves on disk as a small file goes through `AtomicFile` (`write_text`, `write_json`
and `append_line` do): a process killed at any moment leaves no file that looks finished and is not,
and a file that cannot be written is told in one sentence. What stands on disk half-written has a
name of one form, `.tmp-NAME-PROCESS`; `remove_leftovers` finds those of killed processes. Folders
of tensors are `checkpoint/container.py`'s.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any, Self

from nanolm.errors import UserError

TEMPORARY = ".tmp-"
OLDER = re.compile(r"\.partial-.+-\d+|.+\.\d+\.partial")
"""Temporary names of earlier versions, which may still lie in a folder."""
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
REMEDIES = {
    **dict.fromkeys(NOT_ALLOWED, "name another place, or get the right to use this one"),
    **dict.fromkeys(NO_SPACE, "free some space and run the same command again"),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a folder is needed, so name another place",
    errno.EEXIST: "something else has that name, so name another place",
    errno.EISDIR: "a folder stands where a file is needed, so name another place",
    errno.ELOOP: "its links lead in a circle, so name another place",
}
"""What helps where the file system refuses a path."""
AGAIN = "run the same command again"
KEPT = f"{AGAIN}, finished files are kept"
RESUME = "run again with --resume auto"
"""What helps a training run, which refuses to begin again in a folder that holds one."""


class AtomicFile:
    """A binary file that appears at `path` only when its `with` block ends without an exception.

    Counts bytes and their SHA-256 while they pass (`size`, `sha256`). Raises UserError when the
    file cannot be written: a full disk, a limit on file sizes, a folder of somebody else. `again`
    says in that sentence how the command goes on, and `name` what the file is called there: the
    option that named it, where there is one.
    """

    def __init__(self, path: str | os.PathLike, again: str = KEPT, name: str | None = None) -> None:
        self.path, self.again, self.name = pathlib.Path(path), again, name or str(path)
        if not self.path.name:  # of "" and ".", which pathlib has no name beside
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path) or "''")
        self.temporary = temporary_name(self.path)
        self.size = 0
        self._digest = hashlib.sha256()
        self.closed = True

    def __enter__(self) -> Self:
        try:
            with self._disk_errors():
                self._file = open(self.temporary, "wb")
        except BaseException:
            # Ctrl-C may come when the file is there and the `with` block has not begun.
            with contextlib.suppress(OSError):
                self.temporary.unlink(missing_ok=True)
            raise
        self.closed = False
        return self

    def write(self, block: Any) -> int:
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
                    sync(self.path.parent)
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
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.name}: {reason(error, self.again)}") from error


def write_text(path: str | os.PathLike, text: str, again: str = KEPT) -> None:
    """Writes a small file atomically: readers see the old content or the new, never half."""
    with AtomicFile(path, again) as file:
        # A page may quote the name of a file, which need not be text: escaped, as on a terminal.
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: str | os.PathLike, value: Any, *, indent: int = 2, again: str = KEPT) -> None:
    """Writes a JSON document atomically; equal values give equal bytes."""
    write_text(path, json_text(value, indent), again)


def json_text(value: Any, indent: int = 2) -> str:
    """A value as the text of a JSON file that a person can read.

    A byte of a file's name that is no UTF-8 stands in Python's texts as half a surrogate pair,
    which no file takes: it is written as JSON's own escape, and read back as it was.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def append_line(path: pathlib.Path, line: str, again: str = KEPT) -> None:
    """Adds a line to a text file, on the disk when this returns; drops a line that a kill tore."""
    before = path.read_bytes() if path.is_file() else b""
    whole = before[: before.rfind(b"\n") + 1]
    write_text(path, whole.decode() + line + "\n", again)


@contextlib.contextmanager
def full_disk_is_told(path: str | os.PathLike, again: str = KEPT) -> Iterator[None]:
    """Turn "no space left" into a UserError that names the file and the remedy; other errors pass:
    this goes round code that reads, too."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"cannot write {path}: {reason(error, again)}") from error


def reason(error: OSError, again: str) -> str:
    """Why a file was not written, and what helps."""
    if error.errno in NO_SPACE:
        full = "the disk is full (No space left on device)"
        what = full if error.errno == errno.ENOSPC else os.strerror(error.errno)
        return f"{what}; free some space and {again}"
    if error.errno in NOT_ALLOWED:
        return f"{os.strerror(error.errno)}; make the folder writable and {again}"
    return f"{error.strerror or error}; put that right and {again}"


def refused_by_the_disk(error: OSError) -> str | None:
    """What a file system refuses of a path whoever asks, in one sentence; None for other errors.

    A name that is too long, a file where a folder should be, rights and room: a user's paths may
    have any of these wherever they are used, so the command line tells them in one place.
    """
    if error.filename is None or error.errno not in REMEDIES:
        return None
    name = os.fsdecode(error.filename)
    return f"cannot use {name}: {os.strerror(error.errno)}; {REMEDIES[error.errno]}"


def sync(path: str | os.PathLike) -> None:
    """Forces a file to disk, or the names in a folder, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_name(path: pathlib.Path) -> pathlib.Path:
    """The name under which this process writes what will be `path`."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is half-written."""
    return name.startswith(TEMPORARY) or OLDER.fullmatch(name) is not None


def remove_leftovers(folder: pathlib.Path) -> list[str]:
    """Deletes what killed writes left in `folder` and below it; returns the names.

    Another process may finish its write, or remove the same, meanwhile: what is gone is gone.
    """
    found = sorted(path for path in _below(folder) if is_temporary(path.name))
    for path in found:
        if path.is_dir() and not path.is_symlink():
            _remove_folder(path)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in found]


def _below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Everything below a folder, what stands in a folder of its own after that one."""
    for here, folders, names in os.walk(folder):  # passes over a folder that vanishes
        yield from (pathlib.Path(here, name) for name in (*folders, *names))


def _remove_folder(folder: pathlib.Path) -> None:
    for here, folders, names in os.walk(folder, topdown=False):
        for name in names:
            pathlib.Path(here, name).unlink(missing_ok=True)
        for name in folders:
            _remove_entry(pathlib.Path(here, name))
    _remove_entry(folder)


def _remove_entry(folder: pathlib.Path) -> None:
    """An empty folder, or a link to one."""
    with contextlib.suppress(FileNotFoundError):
        if folder.is_symlink():
            folder.unlink()
        else:
            folder.rmdir()


class Finished:
    """What was finished of a long piece of work, in one JSON file: cells by key (`key_of`).

        {BESIDE: {…}, …, "cells": {KEY: {…}, …}}

    A cell is on the disk when `put` returns, so work that was broken off goes on where it was. Safe
    to use from several threads. `owner` is whose results these are, for the sentence that refuses a
    file which is something else (UserError); `beside` names what else the file keeps; with
    `fresh`, what is there is replaced by the first `put`.
    """

    def __init__(
        self, path: str | os.PathLike, owner: str, *beside: str, fresh: bool = False
    ) -> None:
        self.path, self.lock = pathlib.Path(path), threading.Lock()
        self.cells: dict[str, dict[str, Any]] = {}
        self.beside: dict[str, dict[str, Any]] = {name: {} for name in beside}
        if self.path.is_file() and not fresh:
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                self.cells = _mapping(found["cells"])
                self.beside = {name: _mapping(found[name]) for name in beside}
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path} is no results file of {owner}; move it away") from None

    def put(self, key: str, cell: dict[str, Any]) -> None:
        """Adds or renews a cell."""
        with self.lock:
            self.cells[key] = cell
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self.beside, "cells": self.cells}, indent=1)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} instead of an object")
    return value


def key_of(what: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value, whatever the order of its keys."""
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
