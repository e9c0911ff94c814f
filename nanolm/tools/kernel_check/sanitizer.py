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
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from nanolm.tools.kernel_check.watch import KernelFaultError, Launch, regions_of


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
    load_in_kernel = TritonSemantic.load
    initialise, execute = GridExecutor._init_args_hst, GridExecutor.__call__

    def watched_load(
        self: Any,
        pointers: TensorHandle,
        mask: TensorHandle,
        other: Any,
        *rest: Any,
        **options: Any,
    ) -> TensorHandle:
        launch = running[-1]
        addresses = launch.access("load", pointers, mask)
        reading = mask
        if launch.outside:  # what lies out of bounds is not read: the launch fails at its end
            at = np.asarray(pointers.data).astype(np.int64)
            within = launch.known(at.ravel()).reshape(at.shape) & mask.data
            reading = TensorHandle(within, mask.dtype)
        result = load(self, pointers, reading, other, *rest, **options)
        traffic.add(traffic.loaded, launch.name, addresses.size * result.data.itemsize)
        defined = launch.has_other or other is not None  # of a descriptor: what it pads with
        if not defined and mask is not None and not mask.data.all():
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

    def watched_semantic(
        self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any
    ) -> Any:
        # The interpreter takes the `other` of a single element for missing when it is 0.
        running[-1].has_other = other is not None
        try:
            return load_in_kernel(self, pointers, mask, other, *rest, **options)
        finally:
            running[-1].has_other = False

    def bare(original: Callable) -> Callable:
        """A load or store without a mask, which the interpreter gives one that is true."""

        def access(self: Any, *arguments: Any) -> Any:
            running[-1].bare = True
            try:
                return original(self, *arguments)
            finally:
                running[-1].bare = False

        return access

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
        named = [*zip(self.arg_names, host_args, strict=False), *host_kwargs.items()]
        running[-1].regions = [r for name, x in named for r in regions_of(x, name)]
        return host_args, host_kwargs

    def watched_launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        launch = Launch(self.fn.__name__, races)
        traffic.add(traffic.launches, launch.name, 1)
        running.append(launch)
        try:
            execute(self, *args, **kwargs)
        except stock.InterpreterError as error:
            fault = fault_of(error)
            if launch.outside and not isinstance(fault, KernelFaultError):
                raise KernelFaultError(launch.outside[0]) from None
            raise fault from None
        finally:
            running.pop()
        if launch.outside:
            raise KernelFaultError(launch.outside[0])
        if races:
            launch.check_races()

    with (
        patched(
            builder,
            {
                "create_load": bare(builder.create_load),
                "create_store": bare(builder.create_store),
                "create_masked_load": watched_load,
                "create_masked_store": watched_store,
                "create_atomic_rmw": watched_rmw,
                "create_atomic_cas": watched_cas,
            },
        ),
        patched(TritonSemantic, {"load": watched_semantic}),
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
