"""Checks of kernels by several processes at once: on a GPU most of a check's time goes into
compiling the kernel, which one core does.

The findings are those of one process, in the same order. Each process holds a context of the device
(on CUDA about half a gigabyte) and takes one check after another from the common queue.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import torch

from nanolm.config.load import import_plugins
from nanolm.errors import UserError
from nanolm.ops.contract import candidates
from nanolm.tools.kernel_check.conformance import Finding, checks_of


@dataclasses.dataclass(frozen=True)
class Errand:
    """One check of one kernel, named by words and numbers, which a process can be sent."""

    op: str
    kernel: str
    device: str
    quick: bool
    number: int
    """Of the check in `checks_of`."""

    def run(self) -> Finding:
        """The check's finding."""
        check = checks_of(self.op, quick=self.quick)[self.number]
        return check(candidates(self.op)[self.kernel], self.device)


def errands(op: str, kernel: str, device: str, *, quick: bool) -> list[Errand]:
    """All checks of a registered kernel."""
    count = len(checks_of(op, quick=quick))
    return [Errand(op, kernel, device, quick, number) for number in range(count)]


def findings(todo: Sequence[Errand], jobs: int, plugins: Sequence[str] = ()) -> Iterator[Finding]:
    """The errands' findings, in their order: by this process with one job, else by as many, which
    import the plug-ins.

    Raises UserError when a process ends before its check does.
    """
    if jobs == 1:
        yield from map(run, todo)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(todo)),
        multiprocessing.get_context("spawn"),  # CUDA does not outlive a fork
        initializer=start,
        initargs=(todo[0].device, plugins),
    )
    with pool:
        try:
            yield from pool.map(run, todo)
        except BrokenProcessPool:
            raise UserError(
                f"--jobs {jobs}: one of the processes ended before its check did (what it said "
                f"stands above); --jobs 1 checks in one process"
            ) from None


def run(errand: Errand) -> Finding:
    """The errand's finding; a function by itself, which can be sent to a process."""
    return errand.run()


def start(device: str, plugins: Sequence[str]) -> None:
    """What a process does first: it takes one thread, since its siblings take the other cores,
    reaches for the device, which may admit one process only, and imports the plug-ins."""
    torch.set_num_threads(1)
    torch.zeros(1, device=device)
    import_plugins(list(plugins))
