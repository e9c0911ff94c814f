"""Tensors of a checkpoint, read one at a time, whether one file holds them or many.

    model.safetensors                    written by one process: whole tensors
    model-00002-of-00004.safetensors     written by four: this one has the third part of the rows

The parts of a tensor are its rows in the order of the files; what is not divided stands in the
first file alone. So any number of processes reads what any number has written.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanolm.errors import UserError

_PART = re.compile(r"(?P<part>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def part_name(part: str, number: int, count: int) -> str:
    """File name of one of `count` files of a part."""
    return f"{part}-{number:05d}-of-{count:05d}.safetensors"


def parts_here(folder: pathlib.Path, part: str) -> list[pathlib.Path]:
    """The files of a part that this folder holds, in the order of their rows."""
    single = folder / f"{part}.safetensors"
    if single.is_file():
        return [single]
    paths = folder.iterdir() if folder.is_dir() else ()
    named = ((path, _PART.fullmatch(path.name)) for path in paths)
    return sorted(path for path, match in named if match and match["part"] == part)


def missing_parts(names: Iterable[str]) -> list[str]:
    """Files that must exist because others of their parts do, and are not among `names`."""
    names = set(names)
    matches = [match for name in names if (match := _PART.fullmatch(name))]
    wanted = {
        part_name(match["part"], number, int(match["count"]))
        for match in matches
        for number in range(int(match["count"]))
    }
    return sorted(wanted - names)


def part_files(folder: pathlib.Path, part: str) -> list[pathlib.Path]:
    """The files of a part, in the order of their rows; none when the checkpoint has no such part.

    Raises UserError when some are missing.
    """
    found = parts_here(folder, part)
    if missing_parts(path.name for path in found):
        raise UserError(
            f"checkpoint {folder} lacks some files of {part}, which are on other nodes or lost; "
            f"copy them here or use another checkpoint"
        )
    return found


class LazyTensors(Mapping[str, Tensor]):
    """name -> whole tensor on the CPU; reading one costs the memory of one.

    Without `whole`, what of each this folder holds. Raises UserError when a file is missing or is
    not safetensors.
    """

    def __init__(self, folder: pathlib.Path, part: str, *, whole: bool = True) -> None:
        self._stack = contextlib.ExitStack()
        self._where: dict[str, list[Any]] = {}
        paths = part_files(folder, part) if whole else parts_here(folder, part)
        if not paths:
            raise UserError(
                f"checkpoint file {folder / part}.safetensors is missing; use another checkpoint"
            )
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"checkpoint file {path} is not safetensors: {error}") from error
            for name in file.keys():  # noqa: SIM118  (not a dict)
                self._where.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(name) for file in self._where[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
