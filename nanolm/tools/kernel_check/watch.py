"""One kernel launch under watch: which memory it may touch, what it touched, and what is wrong.

`sanitizer.sanitized` hands every load, store and atomic of the interpreter to a `Launch`, which
checks bounds at once and races at the end.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as stock
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor


class KernelFaultError(AssertionError):
    """A kernel touched memory in a way that a GPU would punish, or not even notice."""


@dataclasses.dataclass
class Region:
    """The bytes of one tensor argument: [start, stop), and which elements exist if not all do."""

    start: int
    stop: int
    itemsize: int
    exists: np.ndarray | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Region:
        """The region of a tensor of any strides."""
        start, size = tensor.data_ptr(), tensor.element_size()
        if tensor.is_contiguous():
            return cls(start, start + tensor.numel() * size, size, None)
        offsets = np.zeros(1, dtype=np.int64)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(length) * stride).ravel()
        exists = np.zeros(offsets.max() + 1, dtype=bool)
        exists[offsets] = True
        return cls(start, start + exists.size * size, size, exists)

    def contains(self, addresses: np.ndarray) -> np.ndarray:
        """bool, per address."""
        inside = (addresses >= self.start) & (addresses < self.stop)
        if self.exists is not None:
            inside[inside] = self.exists[(addresses[inside] - self.start) // self.itemsize]
        return inside

    def distance(self, address: int) -> int:
        """Elements from this region to an address outside it; negative before its start."""
        if address < self.start:
            return (address - self.start) // self.itemsize
        return max(0, (address - self.stop) // self.itemsize + 1)


def regions_of(argument: Any) -> Iterator[Region]:
    """The regions of all tensors in an argument, which may be a tuple or a tensor's descriptor."""
    if isinstance(argument, torch.Tensor):
        if argument.numel():
            yield Region.of(argument)
    elif isinstance(argument, TensorDescriptor):
        yield from regions_of(argument.base)
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from regions_of(part)


@dataclasses.dataclass
class Access:
    """Addresses that one program touched at one place."""

    addresses: np.ndarray
    program: int


class Launch:
    """One launch under watch: its tensors, and every access of every program."""

    def __init__(self, name: str, races: bool) -> None:
        self.name, self.races = name, races
        self.regions: list[Region] = []
        self.bare = False
        """Whether the access at hand was written without a mask."""
        self.has_other = False
        """Whether the load at hand says what its masked lanes are."""
        self.log: dict[str, list[Access]] = {"load": [], "store": [], "atomic": []}

    def where(self) -> str:
        """The kernel's line that is being executed: the innermost frame outside Triton."""
        files = {fn.__code__.co_filename for fn in stock.InterpretedFunction.rewritten_fn}
        files = {file for file in files if "/triton/language/" not in file}
        for frame in reversed(traceback.extract_stack()):
            if frame.filename in files:
                return f"{frame.filename}:{frame.lineno}"
        return self.name

    @property
    def program(self) -> int:
        """Linear number of the running program."""
        x, y, z = stock.interpreter_builder.grid_idx
        _, n_y, n_z = stock.interpreter_builder.grid_dim
        return (x * n_y + y) * n_z + z

    def access(self, kind: str, pointers: TensorHandle, mask: TensorHandle | None) -> np.ndarray:
        """Checks the bounds of one access and remembers it; returns its addresses."""
        addresses = np.atleast_1d(pointers.data).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.atleast_1d(mask.data), addresses.shape)]
        addresses = addresses.ravel()
        known = np.zeros(addresses.shape, dtype=bool)
        for region in self.regions:
            if known.all():
                break
            known |= region.contains(addresses)
        if not known.all():
            address = int(addresses[~known][0])
            nearest = min(self.regions, key=lambda region: abs(region.distance(address)))
            raise KernelFaultError(
                f"{self.name}: {kind} of {int((~known).sum())} elements out of bounds"
                f"{' without a mask' * self.bare}, "
                f"{nearest.distance(address):+d} elements from the nearest tensor, by program "
                f"{stock.interpreter_builder.grid_idx} at {self.where()}"
            )
        if self.races:
            self.log[kind].append(Access(addresses, self.program))
        return addresses

    def check_lanes(
        self, addresses: np.ndarray, value: TensorHandle, mask: Any, shape: Any
    ) -> None:
        """Raises KernelFaultError when one store writes two values to one element."""
        unique, index = np.unique(addresses, return_inverse=True)
        if unique.size == addresses.size:
            return
        values = np.broadcast_to(value.data, shape)
        values = values[np.broadcast_to(mask.data, shape)] if mask is not None else values.ravel()
        last = np.zeros(unique.size, values.dtype)
        last[index] = values
        if (last[index] != values).any():
            raise KernelFaultError(
                f"{self.name}: lanes of one store write different values to one element, at "
                f"{self.where()}"
            )

    def check_races(self) -> None:
        """Raises KernelFaultError when programs depend on their order."""
        stored, writer = self.pairs("store")
        repeated = stored[1:][stored[1:] == stored[:-1]]
        if repeated.size:
            programs = writer[stored == repeated[0]][:4].tolist()
            raise KernelFaultError(
                f"{self.name}: write-write race, {np.unique(repeated).size} elements are stored by "
                f"several programs, one of them by {programs}"
            )
        if not stored.size:
            return
        for kind in ("load", "atomic"):
            addresses, program = self.pairs(kind)
            at = np.searchsorted(stored, addresses).clip(max=stored.size - 1)
            clash = (stored[at] == addresses) & (writer[at] != program)
            if clash.any():
                first = int(np.flatnonzero(clash)[0])
                raise KernelFaultError(
                    f"{self.name}: {kind}-write race, {int(clash.sum())} elements; program "
                    f"{program[first]} {kind}s what program {writer[at[first]]} stores"
                )

    def pairs(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Distinct (address, program) of one kind of access, sorted."""
        log = self.log[kind]
        if not log:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        addresses = np.concatenate([access.addresses for access in log])
        programs = np.concatenate([np.full(a.addresses.size, a.program) for a in log])
        both = np.unique(np.stack([addresses, programs]), axis=1)
        return both[0], both[1]
