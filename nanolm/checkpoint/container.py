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
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanolm.checkpoint.lazy_tensors import LazyTensors
from nanolm.errors import UserError
from nanolm.files import AGAIN, RESUME, file_sha256, json_text, reason, sync, temporary_name

INDEX = "index.json"
FORMAT = 1
TOO_DEEP = (OverflowError, RecursionError)
"""What JSON from a stranger can cause beside nonsense: numbers and nesting without end."""


def write_folder(
    folder: pathlib.Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    small: Mapping[str, bytes],
) -> None:
    """Writes `<part>.safetensors` for each part and the small files as one atomic folder.

    Raises UserError when the disk is full or not writable; nothing of the attempt stays behind and
    an existing folder of that name is only replaced by a complete one.
    """
    temporary = begin_folder(folder, AGAIN)
    try:
        parts = {f"{part}.safetensors": named for part, named in tensors.items()}
        write_parts(temporary, folder, parts, AGAIN)
        finish_folder(temporary, folder, small, AGAIN)
    except UserError:
        discard_folder(temporary)
        raise


def begin_folder(folder: pathlib.Path, again: str = RESUME) -> pathlib.Path:
    """A temporary folder for what will be `folder`; raises UserError when it cannot be made."""
    temporary = temporary_name(folder)
    with _told(folder, again):
        temporary.mkdir(parents=True)
    return temporary


def write_parts(
    temporary: pathlib.Path,
    folder: pathlib.Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    again: str = RESUME,
) -> None:
    """Writes named tensors as the files of these names; on the disk when this returns."""
    with _told(folder, again):
        for name, named in parts.items():
            path = temporary / name
            contiguous = {key: tensor.contiguous() for key, tensor in named.items()}
            save_file(contiguous, path, metadata={"format": "pt"})
            sync(path)


def finish_folder(
    temporary: pathlib.Path,
    folder: pathlib.Path,
    small: Mapping[str, bytes],
    again: str = RESUME,
) -> None:
    """Adds the small files and the index, and gives the folder its name."""
    with _told(folder, again):
        for name, content in small.items():
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
def _told(folder: pathlib.Path, again: str) -> Iterator[None]:
    """Inside, a file that cannot be written is the user's to know."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = reason(_system_error(error), again)
        raise UserError(f"checkpoint {folder} not written: {why}") from error


def _system_error(error: OSError | SafetensorError) -> OSError:
    """The system's error, which safetensors hands on in words."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _write_index(folder: pathlib.Path) -> None:
    described = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }
    text = json_text({"format": FORMAT, "files": described})
    (folder / INDEX).write_text(text, encoding="utf-8")


def _rename(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    if folder.exists():
        aside = temporary_name(folder.with_name(f"old-{folder.name}"))
        folder.rename(aside)
        temporary.rename(folder)
        shutil.rmtree(aside)
    else:
        temporary.rename(folder)
    sync(folder.parent)


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
        if file_sha256(path) != expected["sha256"]:
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
