"""The conformance suite: is this kernel right, for everything that it says it can serve?

It asks `why_not` for every trial first. A refusal is fine, in words; a wrong answer is not. Kernels
that refuse training but serve prefill or decoding are checked forward only.

    parity        outputs and gradients against the float64 reference, feature by feature, also at
                  larger sizes, with larger numbers and in the dtypes that autocast mixes; in 16
                  bits at sizes of several whole tiles of the device at hand (main_loops.py)
                  and, of attention, on masks and biases that one data set does not show
                  (attention_corners.py)
    leaks         hidden keys change nothing, for each kind of mask
    dropout       what it drops, how it scales, and that the gradient is of what was kept
    other numbers nothing is remembered from one call to the next, not by place in memory either
    habits        evaluation, frozen inputs, gradients of any strides, calls that overlap, nothing
                  kept (habits.py, op_habits.py, attention_habits.py), and what a process has once
                  (settings.py)
    why_not       goes by the spec alone, and run does not go by what it was asked (answers.py)
    determinism   twice the same bits; gradients of a kernel that says that they vary are noted
    memory        what is saved for the backward pass does not grow with T x S
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import torch

from nanolm.ops.contract import Phase
from nanolm.registry import OPS
from nanolm.tools.kernel_check.answers import answers_fault, refusal_of
from nanolm.tools.kernel_check.attention_cases import HARD, LARGE, MIXED, SINGLE, Case
from nanolm.tools.kernel_check.attention_corners import CORNERS
from nanolm.tools.kernel_check.attention_habits import OF_TRAINING, QUESTIONS, Question
from nanolm.tools.kernel_check.attention_trials import spec_of, trial_of
from nanolm.tools.kernel_check.diagnosis import Remark, fault
from nanolm.tools.kernel_check.dropout import RATE, dropout_fault
from nanolm.tools.kernel_check.findings import (
    Check,
    Finding,
    check_determinism,
    check_habit,
    check_other_numbers,
    finding_of,
    found_on,
    right_alone,
    told,
)
from nanolm.tools.kernel_check.habits import HABITS, Habit
from nanolm.tools.kernel_check.leaks import KINDS, leak
from nanolm.tools.kernel_check.main_loops import LONG, whole_tiles
from nanolm.tools.kernel_check.narrowing import narrowed
from nanolm.tools.kernel_check.op_conformance import op_checks
from nanolm.tools.kernel_check.saved import what_is_saved
from nanolm.tools.kernel_check.serving import (
    NARROW,
    WIDTHS,
    Serving,
    served_trial,
    what_was_tried,
)
from nanolm.tools.kernel_check.trial import Trial


def check_kernel(
    op: str, kernel: Any, device: str = "cpu", *, quick: bool = False
) -> list[Finding]:
    """All findings about a kernel of an op. Raises ValueError for an unknown op."""
    return [check(kernel, device) for check in checks_of(op, quick=quick)]


def checks_of(op: str, *, quick: bool = False) -> list[Check]:
    """The suite of an op, each check by itself. Raises ValueError for an unknown op."""
    if op not in OPS:
        raise ValueError(f"there is no op {op!r}; choose from {', '.join(OPS)}")
    if op != "attention":
        return op_checks(op)
    cases = SINGLE | MIXED | LARGE | ({} if quick else HARD) | CORNERS
    return [
        *(case_check(name, case) for name, case in cases.items()),
        *(long_check(name, case) for name, case in LONG.items()),
        *(leak_check(kind) for kind in KINDS),
        Check("dropout", check_dropout),
        Check(
            "other numbers",
            lambda kernel, on: check_other_numbers(
                kernel, lambda: served_trial(kernel, "causal", on)
            ),
        ),
        # With one tile of keys there is one order to add dQ in: the second has many.
        *(determinism_check(name) for name in ("causal", "1100 keys")),
        Check("memory", check_memory),
        *(
            habit_check(name, find, lambda *on: served_trial(on[0], "causal", on[1]))
            for name, find in HABITS.items()
        ),
        *(question_check(name, find) for name, find in QUESTIONS.items()),
        Check("why_not", check_answers),
    ]


def question_check(name: str, find: Question) -> Check:
    """What attention kernels alone are asked, of all problems that they serve."""

    def work(kernel: Any, device: str) -> Finding:
        phases = ("train",) if name in OF_TRAINING else get_args(Phase)
        serving = Serving(kernel, device, phases)
        reasons: list[str] = []  # empty for each case that is served

        def serves(case: Case) -> Trial | None:
            served, reason = serving(case)
            reasons.append(reason)
            return None if served is None else trial_of(served, device)

        words = find(kernel, serves)
        if all(reasons):
            return Finding(name, "refused", reasons[0])
        return finding_of(name, words)

    return Check(name, lambda kernel, device: told(name, lambda: work(kernel, device)))


def check_answers(kernel: Any, device: str) -> Finding:
    """`why_not`, asked of all problems in every phase, in one order and the reverse."""

    def work() -> Finding:
        cases = (SINGLE | MIXED | LARGE | HARD | CORNERS).values()
        specs = [
            dataclasses.replace(spec_of(case, device), phase=phase, dropout=dropout)
            for case in cases
            for phase in get_args(Phase)
            for dropout in (0.0, RATE)
        ]
        serving = Serving(kernel, device)
        some = [
            served
            for name in ("plain", "causal", "window", "soft-cap")
            if (served := serving(SINGLE[name])[0]) is not None
        ]
        specs += [spec_of(served, device) for served in some]
        words = answers_fault(kernel, specs, [functools.partial(trial_of, c, device) for c in some])
        if words is None and not some:  # of a kernel that serves nothing no check is passed
            return Finding("why_not", "refused", refusal_of(kernel, specs[0]) or "")
        return finding_of("why_not", words)

    return told("why_not", work)


def habit_check(name: str, find: Habit, make: Callable[[Any, str], Trial]) -> Check:
    """One habit on the trial that is made for a kernel and a device."""
    return Check(
        name, lambda kernel, device: check_habit(name, find, kernel, lambda: make(kernel, device))
    )


def case_check(name: str, case: Case) -> Check:
    """Parity on this attention problem."""
    return Check(name, lambda kernel, device: check_case(kernel, name, case, device))


def long_check(name: str, case: Case) -> Check:
    """Parity on this attention problem with several whole tiles of the device at hand."""
    return Check(
        name,
        lambda kernel, device: check_case(kernel, name, whole_tiles(case, device), device),
    )


def leak_check(kind: str) -> Check:
    """No leak through this kind of mask."""
    return Check(f"leak: {kind}", lambda kernel, device: check_leak(kernel, kind, device))


def determinism_check(name: str) -> Check:
    """The same bits twice on this attention problem."""
    words = f"determinism: {name}"
    return Check(
        words,
        lambda kernel, device: check_determinism(
            kernel, lambda: served_trial(kernel, name, device), words
        ),
    )


def check_case(kernel: Any, name: str, case: Case, device: str) -> Finding:
    """Parity on one attention problem, in the first phase that is served; of what the kernel
    refuses as a whole on the part that it serves, where no other check asks that."""

    def work() -> Finding:
        serving = Serving(kernel, device)
        served, reason = serving(case)
        if served is not None:
            tried = what_was_tried(case, served)
            return found_on(tried, name, case_fault(kernel, served, device))
        part = narrowed(case, lambda part: serving(part)[0] is not None)
        if part is None or part[0] in (SINGLE | MIXED | LARGE | HARD | CORNERS).values():
            return Finding(name, "refused", reason)
        served, _ = serving(part[0])
        assert served is not None  # `narrowed` has asked
        without = f"without {' and '.join(part[1])}"
        tried = ", ".join(filter(None, [without, what_was_tried(part[0], served)]))
        return found_on(tried, name, case_fault(kernel, served, device))

    return told(name, work)


def case_fault(kernel: Any, served: Case, device: str) -> str | None:
    """What is wrong on an attention problem that the kernel serves."""
    trial = trial_of(served, device)
    words = fault(kernel, trial)
    if words is None or isinstance(words, Remark):
        return words
    if right_alone(kernel, trial):
        return f"it remembers earlier calls, without which it is right here: {words}"
    plain = dataclasses.replace(served, integers=torch.int64)
    if plain != served and fault(kernel, trial_of(plain, device)) is None:
        return "it takes the integers of masks for int64; these are int32"
    return words


def check_dropout(kernel: Any, device: str) -> Finding:
    """What is dropped and how, forward and backward."""

    def work() -> Finding:
        serving = Serving(kernel, device)
        case = dataclasses.replace(SINGLE["plain"], width=serving.home.get("width", WIDTHS[0]))
        spec = dataclasses.replace(spec_of(case, device), dropout=RATE)
        dtypes = (torch.float32, *NARROW)
        reasons = [refusal_of(kernel, dataclasses.replace(spec, dtype=dtype)) for dtype in dtypes]
        if None not in reasons:
            return Finding("dropout", "refused", reasons[0] or "")
        words = dropout_fault(kernel, device, dtypes[reasons.index(None)], case.width)
        return Finding("dropout", "pass" if words is None else "FAIL", words or "")

    return told("dropout", work)


def check_leak(kernel: Any, kind: str, device: str) -> Finding:
    """Hidden keys change nothing."""
    name = f"leak: {kind}"

    def work() -> Finding:
        served, reason = Serving(kernel, device)(SINGLE[kind])
        if served is None or served.phase == "decode":
            return Finding(name, "refused", reason)
        words = leak(kernel, kind, device, served)
        return Finding(name, "pass") if words is None else Finding(name, "FAIL", words)

    return told(name, work)


def check_memory(kernel: Any, device: str) -> Finding:
    """Bytes saved for the backward pass, against those of q, k, v, out and lse."""

    def work() -> Finding:
        served, reason = Serving(kernel, device)(Case(n_rows=1, n_queries=128, n_keys=128))
        if served is None or served.phase != "train":
            return Finding("memory", "refused", reason)
        return Finding("memory", "pass", what_is_saved(kernel, served, device))

    return told("memory", work)
