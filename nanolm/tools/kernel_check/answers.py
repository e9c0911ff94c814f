"""What a kernel answers when it is asked whether it can serve: one object is asked for every layer
kind and phase of a model, and then serves them all in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanolm.ops.contract import Spec
from nanolm.tools.kernel_check.diagnosis import fault
from nanolm.tools.kernel_check.settings import SettingsChangedError
from nanolm.tools.kernel_check.trial import Trial


def refusal_of(kernel: Any, spec: Any) -> str | None:
    """What `why_not` says; raises TypeError when that is neither a sentence nor None."""
    reason = kernel.why_not(spec)
    if reason is not None and not (isinstance(reason, str) and reason.strip()):
        raise TypeError(f"why_not returned {reason!r}: a sentence is due, or None for yes")
    return reason


def answers_fault(
    kernel: Any, specs: Sequence[Spec], served: Sequence[Callable[[], Trial]]
) -> str | None:
    """A sentence about `why_not`, or None: the same answer whatever was asked before, and nothing
    of a spec that `run` goes by."""
    once = [refusal_of(kernel, spec) for spec in specs]
    again = [refusal_of(kernel, spec) for spec in reversed(specs)][::-1]
    for first, second in zip(once, again, strict=True):
        if (first is None) != (second is None):
            return (
                f"its why_not answers {first!r} and, asked again after other specs, {second!r}: "
                f"it must go by the spec alone"
            )
    trials = [make() for make in served]
    for trial, other in zip(trials, [*trials[1:], *trials[:1]], strict=True):
        if refusal_of(kernel, trial.spec) is not None or fault(kernel, trial) is not None:
            continue  # wrong by itself, which parity tells
        refusal_of(kernel, other.spec)
        words = raised_or_wrong(kernel, trial)
        if words is not None:
            return (
                f"its run goes by the spec that why_not was asked about last, and one kernel "
                f"serves all layers: {words}"
            )
    return None


def raised_or_wrong(kernel: Any, trial: Trial) -> str | None:
    """What is wrong on a trial that the kernel was right on a moment ago."""
    try:
        return fault(kernel, trial)
    except SettingsChangedError:
        raise  # that is what it is told
    except Exception as error:  # noqa: BLE001  (a foreign kernel may raise anything; it is told)
        return f"it raises {type(error).__name__}: {error}"
