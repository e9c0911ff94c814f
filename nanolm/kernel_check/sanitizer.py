"""A memory sanitizer for Triton kernels that run in the interpreter, on any CPU.

    with sanitized() as traffic:
        kernel[grid](...)

raises KernelFaultError, naming the kernel and its line, when

    bounds    a load, store or atomic touches an address that belongs to no tensor argument; the
              gaps of a strided view do not belong to it
    races     two programs touch one element and one of them stores it plainly (the GPU orders
              programs as it likes), or lanes of one store write different values to one element
    poison    (indirectly) masked-out lanes of a load without `other` are undefined on a GPU; the
              interpreter gives 0, the sanitizer NaN or a huge integer, so using them shows

and counts in `traffic` the bytes that every kernel loads and stores. It works with any control flow
because the interpreter is concrete. What it cannot see: hazards between threads of one program.

`shuffled(seed)` visits the programs of each launch in another order: a kernel whose programs are
independent gives the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


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
    """The regions of all tensors in an argument, which may be a tuple."""
    if isinstance(argument, torch.Tensor):
        if argument.numel():
            yield Region.of(argument)
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
                f"{self.name}: {kind} of {int((~known).sum())} elements out of bounds, "
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


@dataclasses.dataclass
class Traffic:
    """Bytes that kernels asked for, by kernel name, and how often each was launched."""

    loaded: dict[str, int] = dataclasses.field(default_factory=dict)
    stored: dict[str, int] = dataclasses.field(default_factory=dict)
    launches: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, table: dict[str, int], name: str, amount: int) -> None:
        """Adds to one kernel's count."""
        table[name] = table.get(name, 0) + amount

    @property
    def bytes(self) -> int:
        """All bytes loaded and stored."""
        return sum(self.loaded.values()) + sum(self.stored.values())


def poison(handle: TensorHandle) -> Any:
    """What an undefined lane holds: NaN, or an integer far outside any tensor."""
    if handle.dtype.scalar == tl.bfloat16:
        return np.uint16(0x7FC0)
    if handle.data.dtype.kind == "f":
        return np.nan
    if handle.data.dtype == np.bool_:
        return True
    return np.iinfo(handle.data.dtype).max // 2


@contextlib.contextmanager
def patched(owner: type, changes: dict[str, Callable]) -> Iterator[None]:
    """Replaces methods of a class for a while."""
    originals = {name: getattr(owner, name) for name in changes}
    for name, change in changes.items():
        setattr(owner, name, change)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


@contextlib.contextmanager
def sanitized(*, races: bool = True) -> Iterator[Traffic]:
    """Watches every kernel launched within it; see the module's docstring."""
    traffic = Traffic()
    running: list[Launch] = []
    builder = InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas
    initialise, execute = GridExecutor._init_args_hst, GridExecutor.__call__

    def watched_load(
        self: Any, pointers: TensorHandle, mask: TensorHandle, other: Any, *rest: Any
    ) -> TensorHandle:
        launch = running[-1]
        addresses = launch.access("load", pointers, mask)
        result = load(self, pointers, mask, other, *rest)
        traffic.add(traffic.loaded, launch.name, addresses.size * result.data.itemsize)
        if other is None and mask is not None and not mask.data.all():
            shown = np.broadcast_to(mask.data, result.data.shape)
            result.data = np.where(shown, result.data, poison(result)).astype(result.data.dtype)
        return result

    def watched_store(
        self: Any, pointers: TensorHandle, value: TensorHandle, mask: Any, *rest: Any
    ) -> None:
        launch = running[-1]
        addresses = launch.access("store", pointers, mask)
        if races:
            launch.check_lanes(addresses, value, mask, np.atleast_1d(pointers.data).shape)
        traffic.add(traffic.stored, launch.name, addresses.size * value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    def watched_rmw(
        self: Any, op: Any, pointers: TensorHandle, value: Any, mask: Any, *rest: Any
    ) -> TensorHandle:
        running[-1].access("atomic", pointers, mask)
        return rmw(self, op, pointers, value, mask, *rest)

    def watched_cas(self: Any, pointers: TensorHandle, *rest: Any) -> TensorHandle:
        running[-1].access("atomic", pointers, None)
        return cas(self, pointers, *rest)

    def watched_arguments(self: GridExecutor, args: Any, kwargs: Any) -> Any:
        host_args, host_kwargs = initialise(self, args, kwargs)
        running[-1].regions = list(regions_of([*host_args, *host_kwargs.values()]))
        return host_args, host_kwargs

    def watched_launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        launch = Launch(self.fn.__name__, races)
        traffic.add(traffic.launches, launch.name, 1)
        running.append(launch)
        try:
            execute(self, *args, **kwargs)
        except stock.InterpreterError as error:
            raise fault_of(error) from None
        finally:
            running.pop()
        if races:
            launch.check_races()

    with (
        patched(
            builder,
            {
                "create_masked_load": watched_load,
                "create_masked_store": watched_store,
                "create_atomic_rmw": watched_rmw,
                "create_atomic_cas": watched_cas,
            },
        ),
        patched(GridExecutor, {"_init_args_hst": watched_arguments, "__call__": watched_launch}),
    ):
        yield traffic


def fault_of(error: BaseException) -> BaseException:
    """The KernelFaultError that an InterpreterError wraps, or the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KernelFaultError):
        cause = cause.__cause__
    return cause or error


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Programs of each launch run in a random order, which must not matter."""
    place = InterpreterBuilder.set_grid_idx
    orders: dict[tuple, np.ndarray] = {}

    def elsewhere(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
        shape = tuple(self.grid_dim)
        if shape not in orders:
            orders[shape] = np.random.default_rng((seed, *shape)).permutation(math.prod(shape))
        index = orders[shape][np.ravel_multi_index((x, y, z), shape)]
        place(self, *(int(i) for i in np.unravel_index(index, shape)))

    with patched(InterpreterBuilder, {"set_grid_idx": elsewhere}):
        yield
