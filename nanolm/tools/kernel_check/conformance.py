"""The conformance suite: is this kernel right, for everything that it says it can serve?

It asks `why_not` for every trial first. A refusal is fine, in words; a wrong answer is not. Kernels
that refuse training but serve prefill or decoding are checked forward only.

    parity        outputs and gradients against the float64 reference, feature by feature, also at
                  larger sizes, with larger numbers and in the dtypes that autocast mixes; in 16
                  bits at sizes of several whole tiles of the device at hand (main_loops.py)
    leaks         hidden keys change nothing, for each kind of mask
    dropout       what it drops, how it scales, and that the gradient is of what was kept
    other numbers nothing is remembered from one call to the next, not by place in memory either
    habits        evaluation, frozen inputs, gradients of any strides, calls that overlap, nothing
                  kept (habits.py, op_habits.py), torch's own settings (settings.py)
    determinism   twice the same bits; gradients of a kernel that says that they vary are noted
    memory        what is saved for the backward pass does not grow with T x S
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, get_args

import torch

from nanolm.ops.contract import Phase, why_it_varies
from nanolm.registry import OPS
from nanolm.tools.kernel_check.attention_cases import HARD, LARGE, MIXED, SINGLE, Case
from nanolm.tools.kernel_check.attention_trials import spec_of, trial_of
from nanolm.tools.kernel_check.diagnosis import fault
from nanolm.tools.kernel_check.dropout import RATE, dropout_fault
from nanolm.tools.kernel_check.habits import HABITS, Habit, in_place
from nanolm.tools.kernel_check.leaks import KINDS, leak
from nanolm.tools.kernel_check.main_loops import LONG, whole_tiles
from nanolm.tools.kernel_check.op_habits import OP_HABITS
from nanolm.tools.kernel_check.op_suites import op_trials
from nanolm.tools.kernel_check.saved import what_is_saved
from nanolm.tools.kernel_check.settings import watched_settings
from nanolm.tools.kernel_check.trial import Trial, execute, forget_graphs


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check's verdict, and what there is to say: "pass", "FAIL", "refused", or "note" for what
    the kernel admits."""

    check: str
    verdict: str
    words: str = ""


OWN_UP = (
    "and nothing says that they may: add in one order, without atomics, or, where gradients alone "
    'differ, write down why: varies_on = {{"{}": "…"}} (kernels/README.md)'
)
NARROW = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Check:
    """What is done with a kernel on a device, and its name, which is known before it is done: who
    does it elsewhere says of a process that ended which check it was doing."""

    name: str
    work: Callable[[Any, str], Finding]

    def __call__(self, kernel: Any, device: str) -> Finding:
        """The check's finding."""
        return self.work(kernel, device)


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
        return [
            *(trial_check(op, number, trial.name) for number, trial in enumerate(op_trials(op))),
            Check("other numbers", lambda *on: check_other_numbers(on[0], first_trial(op, on[1]))),
            Check("determinism", lambda *on: check_determinism(on[0], first_trial(op, on[1]))),
            *(
                habit_check(name, find, lambda _, device: first_trial(op, device)())
                for name, find in (HABITS | OP_HABITS.get(op, {})).items()
            ),
        ]
    cases = SINGLE | MIXED | LARGE | ({} if quick else HARD)
    return [
        *(case_check(name, case) for name, case in cases.items()),
        *(long_check(name, case) for name, case in LONG.items()),
        *(leak_check(kind) for kind in KINDS),
        Check("dropout", check_dropout),
        Check(
            "other numbers",
            lambda *on: check_other_numbers(on[0], lambda: served_trial(on[0], "causal", on[1])),
        ),
        # With one tile of keys there is one order to add dQ in: the second has many.
        *(determinism_check(name) for name in ("causal", "1100 keys")),
        Check("memory", check_memory),
        *(
            habit_check(name, find, lambda *on: served_trial(on[0], "causal", on[1]))
            for name, find in HABITS.items()
        ),
    ]


def first_trial(op: str, device: str) -> Callable[[], Trial]:
    """What makes the trial that stands for an op where one is enough."""
    return lambda: op_trials(op, device)[0]


def habit_check(name: str, find: Habit, make: Callable[[Any, str], Trial]) -> Check:
    """One habit on the trial that is made for a kernel and a device."""
    return Check(
        name,
        lambda kernel, device: asked(
            name, kernel, lambda: make(kernel, device), lambda trial: find(kernel, trial)
        ),
    )


def trial_check(op: str, number: int, name: str) -> Check:
    """Parity on the op's trial of this number."""
    return Check(name, lambda *on: check_trial(on[0], op_trials(op, on[1])[number]))


def case_check(name: str, case: Case) -> Check:
    """Parity on this attention problem."""
    return Check(name, lambda kernel, device: check_case(kernel, name, case, device))


def long_check(name: str, case: Case) -> Check:
    """Parity on this attention problem with several whole tiles of the device at hand."""
    return Check(name, lambda *on: check_case(on[0], name, whole_tiles(case, on[1]), on[1]))


def leak_check(kind: str) -> Check:
    """No leak through this kind of mask."""
    return Check(f"leak: {kind}", lambda kernel, device: check_leak(kernel, kind, device))


def determinism_check(name: str) -> Check:
    """The same bits twice on this attention problem."""
    told_as = f"determinism: {name}"
    return Check(
        told_as,
        lambda kernel, device: check_determinism(
            kernel, lambda: served_trial(kernel, name, device), told_as
        ),
    )


def refusal_of(kernel: Any, spec: Any) -> str | None:
    """What `why_not` says; raises TypeError when that is neither a sentence nor None."""
    reason = kernel.why_not(spec)
    if reason is not None and not (isinstance(reason, str) and reason.strip()):
        raise TypeError(f"why_not returned {reason!r}: a sentence is due, or None for yes")
    return reason


def serving(kernel: Any, case: Case, device: str) -> tuple[Case | None, str]:
    """The case in the first phase that the kernel serves, or (None, its reason). One in float32 is
    put to a kernel of 16 bits in these: it would be tried on a handful of cases otherwise."""
    reason = ""
    dtypes = (case.dtype, *(NARROW if case.dtype == torch.float32 else ()))
    for phase, dtype in itertools.product(get_args(Phase), dtypes):
        candidate = dataclasses.replace(case, phase=phase, dtype=dtype)
        if phase == "decode" and case.n_queries != 1:
            candidate = dataclasses.replace(candidate, n_queries=1)
        refusal = refusal_of(kernel, spec_of(candidate, device))
        if refusal is None:
            return candidate, ""
        reason = reason or refusal
    return None, reason


def check_case(kernel: Any, name: str, case: Case, device: str) -> Finding:
    """Parity on one attention problem, in the first phase that is served."""

    def work() -> Finding:
        served, reason = serving(kernel, case, device)
        if served is None:
            return Finding(name, "refused", reason)
        trial = trial_of(served, device)
        words = fault(kernel, trial)
        if words is None:
            return Finding(name, "pass", what_was_tried(case, served))
        plain = dataclasses.replace(served, integers=torch.int64)
        if plain != served and fault(kernel, trial_of(plain, device)) is None:
            words = "it takes the integers of masks for int64; these are int32"
        return Finding(name, "FAIL", words)

    return told(name, work)


def what_was_tried(case: Case, served: Case) -> str:
    """How the case that was served differs from the one that was asked for."""
    words = [] if served.phase == "train" else ["forward only"]
    if served.dtype != case.dtype:
        words.insert(0, f"in {str(served.dtype).removeprefix('torch.')}")
    return ", ".join(words)


def check_trial(kernel: Any, trial: Trial) -> Finding:
    """Parity on one trial."""
    return asked(trial.name, kernel, lambda: trial, lambda trial: fault(kernel, trial))


def asked(
    name: str, kernel: Any, make: Callable[[], Trial], words_of: Callable[[Trial], str | None]
) -> Finding:
    """What `words_of` finds wrong on a trial, once the kernel has said that it serves it."""

    def work() -> Finding:
        trial = make()
        reason = refusal_of(kernel, trial.spec)
        if reason is not None:
            return Finding(name, "refused", reason)
        words = words_of(trial)
        return Finding(name, "pass" if words is None else "FAIL", words or "")

    return told(name, work)


def told(name: str, work: Callable[[], Finding]) -> Finding:
    """The finding, or that the kernel raises, as a foreign one may raise anything, or ends the
    process, or leaves torch otherwise than it was."""
    forget_graphs()
    with watched_settings() as written:
        try:
            finding = work()
        except (Exception, SystemExit) as error:  # noqa: BLE001  (it is reported)
            finding = Finding(name, "FAIL", f"it raises {type(error).__name__}: {error}")
    if not written:
        return finding
    words = f"it calls {', '.join(written)}, which changes what all others compute after it"
    return Finding(name, "FAIL", words)


def served_trial(kernel: Any, name: str, device: str) -> Trial:
    """An attention problem in the first phase that is served, or in training."""
    case = (SINGLE | LARGE)[name]
    served, _ = serving(kernel, case, device)
    return trial_of(served or case, device)


def check_other_numbers(kernel: Any, make: Callable[[], Trial]) -> Finding:
    """A call is right after one with other numbers of the same shapes."""

    def words_of(trial: Trial) -> str | None:
        execute(trial, kernel, backward=trial.differentiable)
        other = {key: x.flip(0).mul(-0.5) for key, x in trial.leaves.items()}
        words = fault(kernel, dataclasses.replace(trial, leaves=other))
        if words is not None:
            return f"after a call with other numbers of these shapes: {words}"
        return in_place(kernel, trial, fault)

    return asked("other numbers", kernel, make, words_of)


def check_dropout(kernel: Any, device: str) -> Finding:
    """What is dropped and how, forward and backward."""

    def work() -> Finding:
        case = SINGLE["plain"]
        reason = refusal_of(kernel, dataclasses.replace(spec_of(case, device), dropout=RATE))
        if reason is not None:
            return Finding("dropout", "refused", reason)
        words = dropout_fault(kernel, device)
        return Finding("dropout", "pass" if words is None else "FAIL", words or "")

    return told("dropout", work)


def check_leak(kernel: Any, kind: str, device: str) -> Finding:
    """Hidden keys change nothing."""
    name = f"leak: {kind}"

    def work() -> Finding:
        served, reason = serving(kernel, SINGLE[kind], device)
        if served is None or served.phase == "decode":
            return Finding(name, "refused", reason)
        words = leak(kernel, kind, device, served)
        return Finding(name, "pass") if words is None else Finding(name, "FAIL", words)

    return told(name, work)


def check_determinism(kernel: Any, make: Callable[[], Trial], name: str = "determinism") -> Finding:
    """The same bits twice, unless the kernel says that its gradients vary; outputs never may."""
    admitted: list[str] = []

    def words_of(trial: Trial) -> str | None:
        once, again = (execute(trial, kernel, backward=trial.differentiable) for _ in range(2))
        changed = [key for key, x in once.tensors.items() if not torch.equal(x, again.tensors[key])]
        if not changed:
            return None
        words = f"{', '.join(changed)} differ between two runs on the same input"
        reason = why_it_varies(kernel, trial.spec.device)
        if reason is None:
            return f"{words}, {OWN_UP.format(trial.spec.device)}"
        if set(changed) & set(once.outputs):
            return f"{words}; its `varies_on` excuses gradients, not outputs"
        admitted.append(f"{words}, as it says: {reason}")
        return None

    found = asked(name, kernel, make, words_of)
    return dataclasses.replace(found, verdict="note", words=admitted[0]) if admitted else found


def check_memory(kernel: Any, device: str) -> Finding:
    """Bytes saved for the backward pass, against those of q, k, v, out and lse."""

    def work() -> Finding:
        served, reason = serving(kernel, Case(n_rows=1, n_queries=128, n_keys=128), device)
        if served is None or served.phase != "train":
            return Finding("memory", "refused", reason)
        return Finding("memory", "pass", what_is_saved(kernel, served, device))

    return told("memory", work)
