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
    """The bytes of one tensor argument: [start, stop), which elements exist if not all do, and the
    argument's name."""

    start: int
    stop: int
    itemsize: int
    exists: np.ndarray | None
    name: str = "a tensor"

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str) -> Region:
        """The region of a tensor of any strides."""
        start, size = tensor.data_ptr(), tensor.element_size()
        if tensor.is_contiguous():
            return cls(start, start + tensor.numel() * size, size, None, name)
        offsets = np.zeros(1, dtype=np.int64)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(length) * stride).ravel()
        exists = np.zeros(offsets.max() + 1, dtype=bool)
        exists[offsets] = True
        return cls(start, start + exists.size * size, size, exists, name)

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


def regions_of(argument: Any, name: str) -> Iterator[Region]:
    """The regions of all tensors in the argument of this name, which may be a tuple or a tensor's
    descriptor."""
    if isinstance(argument, torch.Tensor):
        if argument.numel():
            yield Region.of(argument, name)
    elif isinstance(argument, TensorDescriptor):
        yield from regions_of(argument.base, name)
    elif isinstance(argument, tuple | list):
        fields = getattr(argument, "_fields", range(len(argument)))
        for field, part in zip(fields, argument, strict=True):
            yield from regions_of(part, f"{name}.{field}")


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
        self.outside: list[str] = []
        """What is said of the first load out of bounds."""
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
        """Checks the bounds of one access and remembers it; returns its addresses.

        Raises KernelFaultError when a store or an atomic goes out of bounds. A load that does is
        kept in `outside` until the launch ends, as the stores behind it are worse.
        """
        addresses = np.atleast_1d(pointers.data).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.atleast_1d(mask.data), addresses.shape)]
        addresses = addresses.ravel()
        known = self.known(addresses)
        if not known.all():
            words = self.words_of_outside(kind, addresses[~known])
            if kind != "load":
                raise KernelFaultError("; ".join([*self.outside, words]))
            self.outside = self.outside or [words]
            addresses = addresses[known]
        if self.races:
            self.log[kind].append(Access(addresses, self.program))
        return addresses

    def known(self, addresses: np.ndarray) -> np.ndarray:
        """bool, per address: whether it belongs to a tensor of the launch."""
        known = np.zeros(addresses.shape, dtype=bool)
        for region in self.regions:
            if known.all():
                break
            known |= region.contains(addresses)
        return known

    def words_of_outside(self, kind: str, addresses: np.ndarray) -> str:
        """A sentence about an access of addresses that belong to no tensor."""
        address = int(addresses[0])
        nearest = min(self.regions, key=lambda region: abs(region.distance(address)), default=None)
        where = "of which it was given none"
        if nearest is not None:
            away = nearest.distance(address)
            where = f"{away:+d} elements from the nearest, {nearest.name}"
            if not away:
                where = f"in a gap between the elements of {nearest.name}"
        return (
            f"{self.name}: {kind} of {addresses.size} elements out of bounds of its tensors"
            f"{', without a mask' * self.bare}, {where}, "
            f"by program {stock.interpreter_builder.grid_idx} at {self.where()}"
        )

    def owner(self, address: int) -> str:
        """The name of the tensor that an address belongs to."""
        here = np.array([address])
        return next((r.name for r in self.regions if r.contains(here)[0]), "memory")

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
        differing = last[index] != values
        if differing.any():
            tensor = self.owner(int(addresses[differing][0]))
            raise KernelFaultError(
                f"{self.name}: lanes of one store write different values to one element of "
                f"{tensor}, at {self.where()}"
            )

    def check_races(self) -> None:
        """Raises KernelFaultError when programs depend on their order."""
        stored, writer = self.pairs("store")
        repeated = stored[1:][stored[1:] == stored[:-1]]
        if repeated.size:
            programs = writer[stored == repeated[0]][:4].tolist()
            raise KernelFaultError(
                f"{self.name}: write-write race, {np.unique(repeated).size} elements of "
                f"{self.owner(int(repeated[0]))} are stored by several programs, one of them by "
                f"{programs}"
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
                    f"{self.name}: {kind}-write race, {int(clash.sum())} elements of "
                    f"{self.owner(int(addresses[first]))}; program {program[first]} {kind}s what "
                    f"program {writer[at[first]]} stores"
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
