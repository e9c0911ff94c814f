"""The checkpoint container: a folder that is complete or not there, and cannot execute anything.

    step-00000015/
        model.safetensors  optimizer.safetensors  …     tensors by name
        trainer.json  config.yaml  tokenizer.model      the rest
        index.json                                      size and SHA-256 of every file above

`write_folder` fills a temporary folder, forces it to disk and renames it; `verify` re-reads every
byte. Who may write what into the folder is `checkpoints.py`'s business.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanolm.checkpoint.lazy_tensors import LazyTensors
from nanolm.errors import UserError

INDEX = "index.json"
FORMAT = 1
TEMPORARY = ".tmp-"
TOO_DEEP = (OverflowError, RecursionError)
"""What JSON from a stranger can cause beside nonsense: numbers and nesting without end."""


def write_folder(
    folder: pathlib.Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, bytes],
) -> None:
    """Writes `<part>.safetensors` for each part and the given files as one atomic folder.

    Raises UserError when the disk is full or not writable; nothing of the attempt stays behind and
    an existing folder of that name is only replaced by a complete one.
    """
    temporary = begin_folder(folder)
    try:
        write_parts(temporary, folder, {f"{part}.safetensors": t for part, t in tensors.items()})
        finish_folder(temporary, folder, files)
    except UserError:
        discard_folder(temporary)
        raise


def begin_folder(folder: pathlib.Path) -> pathlib.Path:
    """A temporary folder for what will be `folder`; raises UserError when it cannot be made."""
    temporary = folder.parent / f"{TEMPORARY}{folder.name}-{os.getpid()}"
    with _told(folder):
        temporary.mkdir(parents=True)
    return temporary


def write_parts(
    temporary: pathlib.Path, folder: pathlib.Path, parts: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Writes named tensors as the files of these names; on the disk when this returns."""
    with _told(folder):
        for name, named in parts.items():
            path = temporary / name
            contiguous = {key: tensor.contiguous() for key, tensor in named.items()}
            save_file(contiguous, path, metadata={"format": "pt"})
            sync(path)


def finish_folder(
    temporary: pathlib.Path, folder: pathlib.Path, files: Mapping[str, bytes]
) -> None:
    """Adds the small files and the index, and gives the folder its name."""
    with _told(folder):
        for name, content in files.items():
            (temporary / name).write_bytes(content)
            sync(temporary / name)
        _write_index(temporary)
        sync(temporary / INDEX)
        sync(temporary)
        _rename(temporary, folder)


def discard_folder(temporary: pathlib.Path) -> None:
    """Removes a temporary folder that will not be finished, when nobody writes into it any more."""
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _told(folder: pathlib.Path) -> Iterator[None]:
    """Inside, a file that cannot be written is the user's to know."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {folder} not written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full; free some space and run again with --resume auto"
    return f"{error}; make the folder writable and run again with --resume auto"


def _write_index(folder: pathlib.Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(folder.iterdir())
    }
    write_json(folder / INDEX, {"format": FORMAT, "files": files})


def _rename(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    if folder.exists():
        aside = folder.parent / f"{TEMPORARY}old-{folder.name}-{os.getpid()}"
        folder.rename(aside)
        temporary.rename(folder)
        shutil.rmtree(aside)
    else:
        temporary.rename(folder)
    sync(folder.parent)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a small file atomically: readers see the old content or the new, never half."""
    temporary = path.parent / f"{TEMPORARY}{path.name}-{os.getpid()}"
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} not written: {_reason(error)}") from error


def append_line(path: pathlib.Path, line: str) -> None:
    """Adds a line to a text file, on the disk when this returns; drops a line that a kill tore.

    Raises UserError when the disk is full or not writable.
    """
    try:
        before = path.read_bytes() if path.is_file() else b""
        whole = before[: before.rfind(b"\n") + 1]
        write_text(path, whole.decode() + line + "\n")
    except OSError as error:
        raise UserError(f"{path} not written: {_reason(error)}") from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sync(path: pathlib.Path) -> None:
    """Forces a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: pathlib.Path) -> list[str]:
    """Deletes what killed writes left in `folder`; returns the names."""
    names = sorted(path.name for path in folder.glob(f"{TEMPORARY}*"))
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return names


def verify(folder: pathlib.Path) -> None:
    """Re-reads every file of the folder.

    Raises UserError naming the first file that is missing, truncated or altered.
    """
    index = folder / INDEX
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: there is no such folder")
    if not index.is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {INDEX}")
    for name, expected in _index_files(index).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint file {path} is missing; use another checkpoint")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise UserError(
                f"checkpoint file {path} has {size} bytes instead of {expected['bytes']}; "
                f"it is truncated or was written to; use another checkpoint"
            )
        if checksum(path) != expected["sha256"]:
            raise UserError(
                f"checkpoint file {path} is damaged (its SHA-256 differs from {INDEX}); "
                f"use another checkpoint"
            )


def _index_files(index: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
        files = {
            str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in value["files"].items()
        }
        version = value["format"]
    except (LookupError, ValueError, TypeError, AttributeError, *TOO_DEEP) as error:
        raise UserError(f"checkpoint index {index} is damaged; use another checkpoint") from error
    if version != FORMAT:
        raise UserError(f"checkpoint index {index} has format {version}; this reads {FORMAT}")
    for name in files:
        if pathlib.PurePath(name).name != name or len(name) > 100 or not name.isprintable():
            raise UserError(f"checkpoint index {index} names {name[:40]!r}, outside its folder")
    return files


def read_tensors(folder: pathlib.Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part, on the CPU; raises UserError when the file cannot be read."""
    return dict(LazyTensors(folder, part))


def read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; raises UserError when it cannot be read."""
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint file {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"checkpoint file {path} is damaged; use another checkpoint")
    return value
