"""The conformance suite of the ops other than attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

from nanolm.ops.contract import Spec
from nanolm.tools.kernel_check.answers import answers_fault, refusal_of
from nanolm.tools.kernel_check.findings import (
    Check,
    Finding,
    check_determinism,
    check_habit,
    check_other_numbers,
    finding_of,
    found_on,
    parity,
    told,
)
from nanolm.tools.kernel_check.habits import HABITS
from nanolm.tools.kernel_check.op_habits import OP_HABITS
from nanolm.tools.kernel_check.op_narrowing import PHASES, part_served
from nanolm.tools.kernel_check.op_stock import (
    LONG,
    SUMS,
    Stock,
    long,
    options_of,
    other_options,
    sums,
)
from nanolm.tools.kernel_check.trial import Trial

FEW = 4
"""Terms of a sum that 16 bits still add up as they should."""
KINDS = 4
"""Of layers that one kernel serves in turn."""


def op_checks(op: str) -> list[Check]:
    """The suite of an op other than attention."""
    stock = Stock(op)
    return [
        *(trial_check(stock, number, trial.name) for number, trial in enumerate(stock.all("cpu"))),
        *(many_check("sums", sums, SUMS[name]) for name in SUMS if name == op),
        *(many_check("long", long, LONG[name]) for name in LONG if name == op),
        *(options_check(op, number) for number in range(len(options_of(op, "cpu")))),
        Check("answers", lambda kernel, device: check_answers(kernel, stock.all(device))),
        each_check("other numbers", stock, check_other_numbers),
        Check(
            "determinism",
            lambda kernel, device: check_determinism(
                kernel, part_maker(kernel, stock.take(0, device))
            ),
        ),
        *(
            each_check(name, stock, functools.partial(check_habit, name, find))
            for name, find in (HABITS | OP_HABITS.get(op, {})).items()
        ),
    ]


def trial_check(stock: Stock, number: int, name: str) -> Check:
    """Parity on the op's trial of this number."""

    def check(kernel: Any, device: str) -> Finding:
        return check_trial(kernel, stock.take(number, device), stock.names(device))

    return Check(name, check)


def check_trial(kernel: Any, trial: Trial, others: Collection[str] = ()) -> Finding:
    """Parity on one trial, or on the part of it that the kernel serves, where that is none of the
    `others` that it is asked about."""

    def work() -> Finding:
        part, reason = part_served(kernel, trial)
        if part is None:
            return Finding(trial.name, "refused", reason)
        made = part.of(trial)
        if part.changes and made.name in others:
            return Finding(trial.name, "refused", refusal_of(kernel, trial.spec) or "")
        return found_on(part.words, trial.name, parity(kernel, made))

    return told(trial.name, work)


def many_check(
    name: str, words_of: Callable[..., str | None], make: Callable[[int, str], Trial]
) -> Check:
    """Many rows, beside a few."""

    def check(kernel: Any, device: str) -> Finding:
        def work() -> Finding:
            part, reason = part_served(kernel, make(FEW, device))
            if part is None:
                return Finding(name, "refused", reason)

            def of_rows(n_rows: int) -> Trial:
                return part.of(make(n_rows, device))

            return found_on(part.words, name, words_of(kernel, of_rows(FEW), of_rows))

        return told(name, work)

    return Check(name, check)


def options_check(op: str, number: int) -> Check:
    """A call behind one with other options."""

    def check(kernel: Any, device: str) -> Finding:
        def work() -> Finding:
            three = []
            for trial in options_of(op, device)[number]:
                part, reason = part_served(kernel, trial)
                if part is None:
                    return Finding("other options", "refused", reason)
                three.append(part.of(trial))
            if three[0].name == three[1].name:
                reason = "of the two it serves what they have in common"
                return Finding("other options", "refused", reason)
            return finding_of("other options", other_options(kernel, *three))

        return told("other options", work)

    return Check(f"other options {number}", check)


def check_answers(kernel: Any, trials: Sequence[Trial]) -> Finding:
    """`why_not`, asked about all trials in every phase, in one order and the reverse, and what it
    serves of layers of several kinds, each in turn."""

    def work() -> Finding:
        served: dict[Spec, Callable[[], Trial]] = {}
        for trial in trials:
            part, reason = part_served(kernel, trial)
            if part is not None and len(served) < KINDS:
                made = part.of(trial)
                served.setdefault(made.spec, ready(made))
        if not served:  # of a kernel that serves nothing no check is passed
            return Finding("answers", "refused", reason)
        specs = [
            dataclasses.replace(trial.spec, phase=phase) for trial in trials for phase in PHASES
        ]
        return finding_of("answers", answers_fault(kernel, specs, list(served.values())))

    return told("answers", work)


def each_check(
    name: str, stock: Stock, check: Callable[[Any, Callable[[], Trial]], Finding]
) -> Check:
    """A check on each of the trials that habits are asked on, or on what the kernel serves of it:
    the first failure, else a pass."""

    def on_each(kernel: Any, device: str) -> Finding:
        found = []
        for trial in stock.habits(device):
            found.append(check(kernel, part_maker(kernel, trial)))
            if found[-1].verdict == "FAIL":
                return found[-1]
        return next((finding for finding in found if finding.verdict == "pass"), found[0])

    return Check(name, on_each)


def part_maker(kernel: Any, trial: Trial) -> Callable[[], Trial]:
    """What makes the part of a trial that a kernel serves, or the whole of one that it refuses, for
    the check to say so."""

    def make() -> Trial:
        part, _ = part_served(kernel, trial)
        return trial if part is None else part.of(trial)

    return make


def ready(trial: Trial) -> Callable[[], Trial]:
    """What makes a trial that is there."""
    return lambda: trial
