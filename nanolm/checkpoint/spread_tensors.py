"""Tensors of a checkpoint whose files lie on several nodes: read where they are, sent to all ranks.

For runs whose nodes have no disk in common (run.shared=false). Like `LazyTensors`, one whole tensor
at a time: each of its files is read by the lowest rank that sees it, which broadcasts the rows.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from nanolm.checkpoint.lazy_tensors import missing_parts, parts_here
from nanolm.distributed.world import World
from nanolm.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
"""Types of tensors in a checkpoint, by their names in safetensors."""


class SpreadTensors(Mapping[str, Tensor]):
    """name -> whole tensor on the CPU, on every rank; building it and reading are collective.

    Raises UserError, on all ranks, when files are on none of the nodes.
    """

    def __init__(self, folder: pathlib.Path, part: str, world: World) -> None:
        self._world, self._stack = world, contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        for path in parts_here(folder, part):
            self._files[path.name] = self._stack.enter_context(safe_open(path, framework="pt"))
        seen: dict[str, tuple[int, dict[str, Any]]] = {}
        for rank, files in enumerate(world.gather(self._describe())):
            for name, tensors in files.items():
                seen.setdefault(name, (rank, tensors))
        missing = missing_parts(seen) if seen else [f"{part}.safetensors"]
        if missing:
            raise UserError(f"checkpoint {folder}: no node has {missing[0]}; use another one")
        # name -> [(file, the rank that reads it, type, shape)], in the order of the rows
        self._where: dict[str, list[tuple[str, int, str, list[int]]]] = {}
        for file, (rank, tensors) in sorted(seen.items()):
            for name, (dtype, shape) in tensors.items():
                self._where.setdefault(name, []).append((file, rank, dtype, shape))

    def _describe(self) -> dict[str, dict[str, tuple[str, list[int]]]]:
        return {
            file: {
                name: (tensors.get_slice(name).get_dtype(), tensors.get_slice(name).get_shape())
                for name in tensors.keys()  # noqa: SIM118  (not a dict)
            }
            for file, tensors in self._files.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._receive(name, *where) for where in self._where[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _receive(self, name: str, file: str, rank: int, dtype: str, shape: list[int]) -> Tensor:
        mine = rank == self._world.rank
        rows = (
            self._files[file].get_tensor(name) if mine else torch.empty(shape, dtype=DTYPES[dtype])
        )
        if self._world.size > 1:
            # As bytes: gloo does not send every type.
            dist.broadcast(rows.view(-1).view(torch.uint8), rank, group=self._world.control)
        return rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
