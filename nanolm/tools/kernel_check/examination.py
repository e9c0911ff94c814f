"""The conformance suite of registered kernels by workers: every check gets its verdict, whatever
the kernel does to the process that it runs in.

First the sanitizer watches a Triton kernel in the interpreter, trial by trial: of one that stores
over memory that is not its own nothing else is asked, since no answer would mean anything. Then
come the checks of `conformance.py`, in their order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from nanolm.config.load import import_plugins
from nanolm.errors import NO_DRIVER, UserError
from nanolm.ops.contract import candidates
from nanolm.registry import KERNELS, OPS
from nanolm.tools.kernel_check.apart import ProcessEndedError, Worker
from nanolm.tools.kernel_check.conformance import Check, Finding, checks_of
from nanolm.tools.kernel_check.interpreter import has_triton, interpreted
from nanolm.tools.kernel_check.safety import UNSAFE, Began, watched_by

MOST_ENDS = 5
"""Processes that one kernel may end; then the rest of its checks is left out."""
INTERPRET = (
    "it is a Triton kernel, and there is no GPU here: interpret it, with TRITON_INTERPRET=1 before "
    "the command"
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A registered kernel that is examined, and whether its package holds a Triton function."""

    op: str
    kernel: str
    triton: bool


class NoKernelError(UserError):
    """Modules were imported that register no kernel."""


@dataclasses.dataclass(frozen=True)
class Find:
    """Imports modules and finds the kernels that they register, or one by its name."""

    modules: tuple[str, ...] = ()
    op: str | None = None
    name: str | None = None

    def run(self) -> list[Subject]:
        """The kernels. Raises UserError when there are none, or none of this name."""
        before = {op: set(candidates(op)) for op in OPS}
        import_plugins(list(self.modules))
        if self.op is not None and self.name is not None:
            KERNELS[self.op].get(self.name)
            known = candidates(self.op)[self.name]
            return [Subject(self.op, self.name, has_triton(known))]
        found = [
            Subject(op, name, has_triton(kernel))
            for op in OPS
            for name, kernel in candidates(op).items()
            if name not in before[op] or type(kernel).__module__ in self.modules
        ]
        if not found:
            raise NoKernelError(registers_nothing(self.modules))
        return found


def silent(modules: Sequence[str]) -> list[str]:
    """Imports modules; a sentence about each that registers no kernel."""
    sentences = []
    for module in modules:
        try:
            Find((module,)).run()
        except NoKernelError as error:
            sentences.append(str(error))
    return sentences


def registers_nothing(modules: Sequence[str]) -> str:
    """The sentence about modules without a kernel."""
    verb = "registers" if len(modules) == 1 else "register"
    return (
        f"{', '.join(modules)} {verb} no kernel; decorate a class with @kernel(op), which is "
        f"`from nanolm.ops.contract import kernel`"
    )


@dataclasses.dataclass(frozen=True)
class Errand:
    """One check of one kernel, named by words and numbers, which a process can be sent."""

    op: str
    kernel: str
    device: str
    quick: bool
    number: int
    """Of the check in `checks_of`."""

    @property
    def name(self) -> str:
        """The check's."""
        return suite(self.op, self.quick)[self.number].name

    def run(self) -> Finding:
        """The check's finding."""
        check = suite(self.op, self.quick)[self.number]
        return check(candidates(self.op)[self.kernel], self.device)


@functools.cache
def suite(op: str, quick: bool) -> tuple[Check, ...]:
    """The checks of an op: to name them their trials are made."""
    return tuple(checks_of(op, quick=quick))


def errands(op: str, kernel: str, device: str, *, quick: bool) -> list[Errand]:
    """All checks of a registered kernel."""
    return [Errand(op, kernel, device, quick, n) for n in range(len(suite(op, quick)))]


def done_by(worker: Worker, errand: Errand) -> tuple[Finding, bool]:
    """The errand's finding, and whether the process ended with it."""
    try:
        finding = worker.ask(errand)
        if NO_DRIVER in finding.words:
            finding = dataclasses.replace(finding, words=INTERPRET)
        return finding, False
    except ProcessEndedError as error:
        words = f"the process of this check {error}"
        return Finding(errand.name, "FAIL", words), True


def examine(
    subject: Subject,
    device: str,
    *,
    quick: bool,
    worker: Worker,
    interpreter: Callable[[], Worker],
    began: Began,
) -> Iterator[Finding]:
    """All findings about one kernel, as they are found: checks by `worker`, and what the sanitizer
    sees by the worker that `interpreter` gives. `began` is told the name of each check."""
    if subject.triton or interpreted():
        memory = watched_by(interpreter(), subject.op, subject.kernel, began)
        if memory is not None:
            yield memory
            if memory.words.endswith(UNSAFE):
                return
    ends = 0
    todo = errands(subject.op, subject.kernel, device, quick=quick)
    for n, errand in enumerate(todo, start=1):
        began(errand.name)
        finding, ended = done_by(worker, errand)
        no_driver = finding.words == INTERPRET
        ends += ended
        yield finding
        if (no_driver or ends == MOST_ENDS) and n < len(todo):
            why = "they would raise the same" if no_driver else f"it ended {ends} processes"
            yield Finding("the others", "note", f"{len(todo) - n} checks are left out: {why}")
            return
