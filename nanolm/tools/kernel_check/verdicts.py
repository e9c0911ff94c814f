"""A check's verdict on a kernel, and how a check is made: the kernel is asked whether it serves,
then watched while it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from nanolm.tools.kernel_check.answers import refusal_of
from nanolm.tools.kernel_check.diagnosis import fault
from nanolm.tools.kernel_check.settings import listening, watched_settings
from nanolm.tools.kernel_check.trial import Trial, forget_graphs


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check's verdict, and what there is to say: "pass", "FAIL", "refused", or "note" for what
    the kernel admits."""

    check: str
    verdict: str
    words: str = ""


@dataclasses.dataclass(frozen=True)
class Check:
    """What is done with a kernel on a device, by the name of its finding."""

    name: str
    find: Callable[[Any, str], Finding]

    def __call__(self, kernel: Any, device: str) -> Finding:
        """The finding."""
        return self.find(kernel, device)


def right_alone(kernel: Any, trial: Trial) -> bool:
    """Whether another object of the kernel's class, which has not been called yet, is right."""
    try:
        fresh = type(kernel)()
    except TypeError:
        return False  # it is made of something: no plug-in's class
    return fault(fresh, trial) is None


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
    process, or leaves it otherwise than it was, or prints."""
    forget_graphs()
    with listening() as (printed, warned), watched_settings() as written:
        try:
            finding = work()
        except (Exception, SystemExit) as error:  # noqa: BLE001  (it is reported)
            finding = Finding(name, "FAIL", f"it raises {type(error).__name__}: {error}")
    faults = [finding.words] if finding.verdict == "FAIL" else []
    if written:
        words = f"it calls {', '.join(written)}, which changes what all others compute after it"
        faults.append(words)
    if printed.getvalue().strip():
        line = printed.getvalue().strip().splitlines()[0]
        faults.append(f"it prints, call for call: {line!r}")
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
