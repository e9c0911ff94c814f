"""The conformance suite of the ops other than attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from nanolm.tools.kernel_check.answers import refusal_of
from nanolm.tools.kernel_check.findings import (
    Check,
    Finding,
    asked,
    check_determinism,
    check_habit,
    check_other_numbers,
    parity,
    told,
)
from nanolm.tools.kernel_check.habits import HABITS
from nanolm.tools.kernel_check.op_habits import OP_HABITS
from nanolm.tools.kernel_check.op_stock import (
    LONG,
    SUMS,
    Stock,
    answers,
    long,
    options_of,
    other_options,
    sums,
)
from nanolm.tools.kernel_check.trial import Trial

FEW = 4
"""Terms of a sum that 16 bits still add up as they should."""


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
            lambda kernel, device: check_determinism(kernel, lambda: stock.take(0, device)),
        ),
        *(
            each_check(name, stock, functools.partial(check_habit, name, find))
            for name, find in (HABITS | OP_HABITS.get(op, {})).items()
        ),
    ]


def trial_check(stock: Stock, number: int, name: str) -> Check:
    """Parity on the op's trial of this number."""
    return Check(name, lambda kernel, device: check_trial(kernel, stock.take(number, device)))


def many_check(
    name: str, words_of: Callable[..., str | None], make: Callable[[int, str], Trial]
) -> Check:
    """Many rows, beside a few."""

    def check(kernel: Any, device: str) -> Finding:
        def words(short: Trial) -> str | None:
            return words_of(kernel, short, lambda n_rows: make(n_rows, device))

        return asked(name, kernel, lambda: make(FEW, device), words)

    return Check(name, check)


def options_check(op: str, number: int) -> Check:
    """A call behind one with other options."""

    def check(kernel: Any, device: str) -> Finding:
        three = options_of(op, device)[number]

        def work() -> Finding:
            refusals = (refusal_of(kernel, trial.spec) for trial in three)
            reason = next((reason for reason in refusals if reason is not None), None)
            if reason is not None:
                return Finding("other options", "refused", reason)
            words = other_options(kernel, *three)
            return Finding("other options", "pass" if words is None else "FAIL", words or "")

        return told("other options", work)

    return Check(f"other options {number}", check)


def check_answers(kernel: Any, trials: Sequence[Trial]) -> Finding:
    """What `why_not` says, asked in any order."""

    def work() -> Finding:
        reasons = [refusal_of(kernel, trial.spec) for trial in trials]
        if None not in reasons:  # of a kernel that serves nothing no check is passed
            return Finding("answers", "refused", reasons[0] or "")
        words = answers(kernel, trials, refusal_of)
        return Finding("answers", "pass" if words is None else "FAIL", words or "")

    return told("answers", work)


def each_check(
    name: str, stock: Stock, check: Callable[[Any, Callable[[], Trial]], Finding]
) -> Check:
    """A check on each of the trials that habits are asked on: the first failure, else a pass."""

    def on_each(kernel: Any, device: str) -> Finding:
        found = []
        for trial in stock.habits(device):
            found.append(check(kernel, ready(trial)))
            if found[-1].verdict == "FAIL":
                return found[-1]
        return next((finding for finding in found if finding.verdict == "pass"), found[0])

    return Check(name, on_each)


def ready(trial: Trial) -> Callable[[], Trial]:
    """What makes a trial that is there."""
    return lambda: trial


def check_trial(kernel: Any, trial: Trial) -> Finding:
    """Parity on one trial."""
    return asked(trial.name, kernel, lambda: trial, lambda trial: parity(kernel, trial))
