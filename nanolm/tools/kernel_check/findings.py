"""One check of a kernel and what it finds, for attention and the other ops alike."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch

from nanolm.ops.contract import why_it_varies
from nanolm.tools.kernel_check.diagnosis import fault
from nanolm.tools.kernel_check.habits import Habit, in_place
from nanolm.tools.kernel_check.settings import CHANGED, SettingsChangedError, watched_settings
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
Check = Callable[[Any, str], Finding]
"""What is done with a kernel on a device."""


def refusal_of(kernel: Any, spec: Any) -> str | None:
    """What `why_not` says; raises TypeError when that is neither a sentence nor None."""
    reason = kernel.why_not(spec)
    if reason is not None and not (isinstance(reason, str) and reason.strip()):
        raise TypeError(f"why_not returned {reason!r}: a sentence is due, or None for yes")
    return reason


def told(name: str, work: Callable[[], Finding]) -> Finding:
    """The finding, or that the kernel raises, as a foreign one may raise anything, or ends the
    process, or leaves torch otherwise than it was."""
    forget_graphs()
    with watched_settings() as written:
        try:
            finding = work()
        except SettingsChangedError as error:
            finding = Finding(name, "FAIL", str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001  (it is reported)
            finding = Finding(name, "FAIL", f"it raises {type(error).__name__}: {error}")
    if not written:
        return finding
    return Finding(name, "FAIL", CHANGED.format(", ".join(written)))


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
    """One habit on a trial."""
    return asked(name, kernel, make, lambda trial: find(kernel, trial))
