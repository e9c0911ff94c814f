"""One check of a kernel and what it finds, for attention and the other ops alike."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch

from nanolm.ops.contract import why_it_varies
from nanolm.tools.kernel_check.answers import refusal_of
from nanolm.tools.kernel_check.diagnosis import Remark, fault
from nanolm.tools.kernel_check.habits import OF_TRAINING, Habit, in_place
from nanolm.tools.kernel_check.settings import (
    CHANGED,
    SettingsChangedError,
    listening,
    watched_settings,
)
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


@dataclasses.dataclass(frozen=True)
class Check:
    """What is done with a kernel on a device, by the name of its finding."""

    name: str
    find: Callable[[Any, str], Finding]

    def __call__(self, kernel: Any, device: str) -> Finding:
        """The finding."""
        return self.find(kernel, device)


def finding_of(name: str, words: str | None, passed: str = "") -> Finding:
    """What a sentence about a kernel, or none, comes to."""
    if words is None:
        return Finding(name, "pass", passed)
    return Finding(name, "note" if isinstance(words, Remark) else "FAIL", str(words))


def found_on(part: str, name: str, words: str | None) -> Finding:
    """The same on a part of what is asked, described in words; of the whole they are empty."""
    found = finding_of(name, words, part)
    if words is None or not part:
        return found
    return dataclasses.replace(found, words=f"{words} ({part})")


def right_alone(kernel: Any, trial: Trial) -> bool:
    """Whether another object of the kernel's class, which has not been called yet, is right."""
    try:
        fresh = type(kernel)()
    except TypeError:
        return False  # it is made of something: no plug-in's class
    return fault(fresh, trial) is None


def told(name: str, work: Callable[[], Finding]) -> Finding:
    """The finding, or that the kernel raises, as a foreign one may raise anything, or ends the
    process, or leaves it otherwise than it was, or prints."""
    forget_graphs()
    with listening() as (printed, warned), watched_settings() as written:
        try:
            finding = work()
        except SettingsChangedError as error:
            finding = Finding(name, "FAIL", str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001  (it is reported)
            finding = Finding(name, "FAIL", f"it raises {type(error).__name__}: {error}")
    faults = [finding.words] if finding.verdict == "FAIL" else []
    if written:
        faults.append(CHANGED.format(", ".join(written)))
    if printed.getvalue().strip():
        line = printed.getvalue().strip().splitlines()[0]
        faults.append(f"it prints to standard output: {line!r}")
    if faults:
        return Finding(name, "FAIL", "; ".join(faults))
    # torch's own come once a process, whichever check is the first to meet them.
    said = [
        str(warning.message)
        for warning in warned
        if issubclass(warning.category, UserWarning | RuntimeWarning)
        and "Triggered internally" not in str(warning.message)
    ]
    if said and not finding.words:
        return dataclasses.replace(finding, words=f"it warns: {said[0].splitlines()[0]}")
    return finding


def asked(
    name: str, kernel: Any, make: Callable[[], Trial], words_of: Callable[[Trial], str | None]
) -> Finding:
    """What `words_of` finds wrong on a trial, once the kernel has said that it serves it."""

    def work() -> Finding:
        trial = make()
        reason = refusal_of(kernel, trial.spec)
        if reason is not None:
            return Finding(name, "refused", reason)
        return finding_of(name, words_of(trial))

    return told(name, work)


def check_other_numbers(kernel: Any, make: Callable[[], Trial]) -> Finding:
    """A call is right after one with other numbers of the same shapes."""

    def words_of(trial: Trial) -> str | None:
        alone = fault(kernel, trial)
        other = {key: x.flip(0).mul(-0.5) for key, x in trial.leaves.items()}
        words = fault(kernel, dataclasses.replace(trial, leaves=other))
        if alone is not None and (words is None or plain(words) == plain(alone)):
            return alone  # it is wrong whatever came before
        if words is not None:
            return f"after a call with other numbers of these shapes: {words}"
        return in_place(kernel, trial, fault)

    return asked("other numbers", kernel, make, words_of)


def plain(words: str) -> str:
    """A sentence without its numbers."""
    return re.sub(r"[-+.\de]*\d", "", words)


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


def check_habit(name: str, find: Habit, kernel: Any, make: Callable[[], Trial]) -> Finding:
    """One habit on a trial; one of training on a trial in training."""

    def make_one() -> Trial:
        trial = make()
        if name not in OF_TRAINING:
            return trial
        return dataclasses.replace(trial, spec=dataclasses.replace(trial.spec, phase="train"))

    return asked(name, kernel, make_one, lambda trial: find(kernel, trial))


def parity(kernel: Any, trial: Trial) -> str | None:
    """What is wrong on a trial, and whether it is right when nothing was called before."""
    words = fault(kernel, trial)
    if words is None or isinstance(words, Remark) or not right_alone(kernel, trial):
        return words
    return f"it remembers earlier calls, without which it is right here: {words}"
