"""Triton kernels of outsiders under the sanitizer, as those of this project are in the tests.

A kernel may be right on the numbers that were tried and wrong all the same: it reads beyond a
tensor, two of its programs write one element, or it counts on what lies in masked lanes. What a GPU
does then is luck; in Triton's interpreter, on any CPU, it is seen. `memory_finding` watches the
trials of an op in this process, which must have been started with TRITON_INTERPRET=1; `watched_by`
sends them, one by one, to a worker that is, before any other check: where a kernel writes over
memory that is not its own, nothing that is found out after that means anything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from nanolm.ops.contract import Phase, candidates
from nanolm.tools.kernel_check.apart import ProcessEndedError, Worker
from nanolm.tools.kernel_check.attention_cases import HARD, LARGE, SINGLE, Case
from nanolm.tools.kernel_check.attention_trials import trial_of
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.op_narrowing import part_served
from nanolm.tools.kernel_check.op_suites import op_trials
from nanolm.tools.kernel_check.serving import Serving
from nanolm.tools.kernel_check.trial import Trial, excess, execute

NAME = "sanitizer"
Began = Callable[[str], None]
"""Is told the name of what begins."""
UNSAFE = "the other checks are left out, as it would write over memory that is not its own"


@dataclasses.dataclass(frozen=True)
class Watched:
    """A problem that a kernel is watched on, by name, and what it takes of it on a device."""

    name: str
    served: Callable[[Any, str], Trial | None]

    def taken(self, kernel: Any) -> Trial | None:
        """What the kernel takes, here or on the GPU that it is meant for."""
        found = (self.served(kernel, device) for device in ("cpu", "cuda"))
        return next((trial for trial in found if trial is not None), None)


def watched_trials(op: str) -> Iterator[Watched]:
    """Where kernels of an op are watched: single features, odd widths, many rows and heads."""
    if op != "attention":
        yield from (Watched(t.name, functools.partial(taken_of_op, t)) for t in op_trials(op))
        return
    others = ("head of 20", "one query, many keys", "nine rows", "eighteen heads")
    for name, case in (SINGLE | {name: (HARD | LARGE)[name] for name in others}).items():
        for phase in get_args(Phase):
            if phase != "decode" or case.n_queries == 1:
                yield Watched(name, functools.partial(taken_of_attention, case, phase))


def taken_of_op(trial: Trial, kernel: Any, device: str) -> Trial | None:
    """What a kernel that is asked about this device serves of a trial."""
    part, _ = part_served(kernel, trial, device)
    return None if part is None else part.of(trial)


def taken_of_attention(case: Case, phase: Phase, kernel: Any, device: str) -> Trial | None:
    """What a kernel that is asked about this device serves of a case in a phase."""
    served, _ = Serving(kernel, device, (phase,))(case)
    return None if served is None else trial_of(served)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was seen on one trial: the launches of each Triton function, None when the kernel does
    not serve it, and the verdict and words of a fault; `last` when nothing more can be watched."""

    launches: dict[str, int] | None = None
    verdict: str = ""
    words: str = ""
    last: bool = False


@dataclasses.dataclass(frozen=True)
class Watch:
    """One trial of a registered kernel under the sanitizer, as a process can be sent it."""

    op: str
    kernel: str
    number: int
    """Of the trial in `watched_trials`."""

    def run(self) -> Seen:
        """What is seen."""
        return seen(candidates(self.op)[self.kernel], kept_trials(self.op)[self.number])


@functools.cache
def kept_trials(op: str) -> list[Watched]:
    """The watched trials, made once."""
    return list(watched_trials(op))


def seen(kernel: Any, watched: Watched) -> Seen:
    """What the sanitizer sees on one trial; in a process with TRITON_INTERPRET=1."""
    launches: dict[str, int] = {}
    try:
        taken = watched.taken(kernel)
        if taken is None:
            return Seen()
        words = memory_fault(kernel, taken, launches)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (parity tells it; here it could not be watched)
        words = f"not watched: in the interpreter it raises {type(error).__name__}: {error}"
        return Seen(launches, "refused", words, last=True)
    return Seen(launches, "FAIL" if words else "", words or "")


def memory_finding(op: str, kernel: Any) -> Finding | None:
    """What the sanitizer sees of a kernel in this process, which has TRITON_INTERPRET=1."""
    return verdict_of((trial.name, seen(kernel, trial)) for trial in watched_trials(op))


def watched_by(worker: Worker, op: str, kernel: str, began: Began) -> Finding | None:
    """What the sanitizer sees of a registered kernel, in a worker with TRITON_INTERPRET=1; `began`
    is told the name of each trial."""

    def all_seen() -> Iterator[tuple[str, Seen]]:
        for number, trial in enumerate(kept_trials(op)):
            began(f"{NAME}: {trial.name}")
            try:
                yield trial.name, worker.ask(Watch(op, kernel, number))
            except ProcessEndedError as error:
                words = f"the process that interprets it {error}"
                yield trial.name, Seen({}, "FAIL", words, last=True)

    return verdict_of(all_seen())


def verdict_of(trials: Iterable[tuple[str, Seen]]) -> Finding | None:
    """The finding about trials by their names, or None when the kernel launches nothing that could
    be watched.

    The first fault is told. The trials behind it are watched all the same for a store out of
    bounds, which is told instead: a mask that one trial only reads beyond is one that another
    writes beyond.
    """
    launches: set[str] = set()
    n_watched = 0
    fault: Finding | None = None
    for name, found in trials:
        if found.launches is None:
            continue
        if found.verdict:
            this = Finding(NAME, found.verdict, f"{name}: {found.words}")
            if found.words.endswith(UNSAFE):
                return this
            fault = fault or this
            if found.last:
                return fault
            continue
        launches |= set(found.launches)
        if not launches:
            return None
        n_watched += 1
    if fault is not None or not n_watched:
        return fault
    return Finding(NAME, "pass", f"{n_watched} trials of {', '.join(sorted(launches))} watched")


def memory_fault(kernel: Any, trial: Trial, launches: dict[str, int]) -> str | None:
    """A sentence about what the kernel does with memory on one trial, or None; counts launches."""
    from nanolm.tools.kernel_check.sanitizer import sanitized  # noqa: PLC0415  (imports Triton)
    from nanolm.tools.kernel_check.watch import KernelFaultError  # noqa: PLC0415

    try:
        with sanitized() as traffic:
            found = execute(trial, kernel, backward=trial.differentiable)
    except KernelFaultError as error:
        return f"{error}; {UNSAFE}" if "store of" in str(error) else str(error)
    for name, count in traffic.launches.items():
        launches[name] = launches.get(name, 0) + count
    off = excess(trial, found)
    wrong = [name for name, share in off.items() if not share < 1]
    if not wrong:
        return None
    plain = excess(trial, execute(trial, kernel, backward=trial.differentiable))
    wrong = [name for name in wrong if plain[name] < 1]
    if not wrong:
        return None  # its numbers are wrong whatever lies in masked lanes, which parity tells
    return (
        f"its {', '.join(wrong)} depend on masked lanes, which are undefined on a GPU: a load with "
        f"`mask` and without `other` whose hidden lanes are used"
    )
