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
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanolm.errors import UserError


def part_name(part: str, number: int, count: int) -> str:
    """File name of one of `count` files of a part."""
    return f"{part}-{number:05d}-of-{count:05d}.safetensors"


def part_files(folder: pathlib.Path, part: str) -> list[pathlib.Path]:
    """The files of a part, in the order of their rows; none when the checkpoint has no such part.

    Raises UserError when some are missing.
    """
    single = folder / f"{part}.safetensors"
    if single.is_file():
        return [single]
    pattern = re.compile(re.escape(part) + r"-(\d{5})-of-(\d{5})\.safetensors")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    counts = {int(pattern.fullmatch(path.name)[2]) for path in found}
    if found and (len(counts) > 1 or len(found) != counts.pop()):
        raise UserError(f"checkpoint {folder} lacks some files of {part}; use another checkpoint")
    return found


class LazyTensors(Mapping[str, Tensor]):
    """name -> whole tensor on the CPU; reading one costs the memory of one.

    Raises UserError when a file is missing or is not safetensors.
    """

    def __init__(self, folder: pathlib.Path, part: str) -> None:
        self._stack = contextlib.ExitStack()
        self._where: dict[str, list[Any]] = {}
        paths = part_files(folder, part)
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
