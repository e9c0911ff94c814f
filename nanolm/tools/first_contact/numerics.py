"""Every kernel at real sizes against float64 on the device, and the same bits twice.

    python -m nanolm.tools.first_contact.numerics [--device cpu] [--only alibi] [--shares 12]

A check fails when the kernel raises, when an output or a gradient is further from the definition
than its precision allows, or when a second run gives other bits, of an output or of a gradient that
the kernel's `varies_on` does not excuse. Compiling is what takes time, so several processes take a
share of the checks each.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from nanolm.ops.contract import candidates, why_it_varies
from nanolm.terminal import say
from nanolm.tools.first_contact.measurement import Figures, enter
from nanolm.tools.first_contact.real_sizes import Check, checks
from nanolm.tools.kernel_check.trial import (
    TOLERANCE,
    Trial,
    distance,
    execute,
    forget_graphs,
    reference_of,
)

BITS_LOST = {"triton_tf32x3": 2}
"""Of a float32 product's 23, by what a kernel says of itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which checks, where."""

    device: str = "cuda"
    """Device type."""
    only: str = ""
    """Only checks whose op or name has this in it."""
    kernels: list[str] | None = None
    """Only these kernels; null means all that serve the device but `reference` and `flex`, whose
    compilation takes longer than all others'."""
    share: int = 0
    """This process takes the checks share, share + shares, …"""
    shares: int = 1
    """How many processes there are."""
    divide: int = 1
    """Divide all sizes by this, where there is no GPU."""
    json: str | None = None
    """Also write a line of JSON for each check to this file."""


def chosen(arguments: Arguments) -> Iterator[Check]:
    """This process's checks."""
    wanted = [
        check
        for check in checks(arguments.device, arguments.divide)
        if arguments.only in f"{check.op} {check.name}"
    ]
    yield from wanted[arguments.share :: arguments.shares]


def serving(check: Check, trial: Trial, arguments: Arguments) -> dict[str, Any]:
    """The kernels that are to be checked on a trial."""
    found = {}
    for name, kernel in candidates(check.op).items():
        if arguments.kernels is None:
            wanted = name not in ("reference", "flex")
            wanted &= arguments.device not in getattr(kernel, "only_by_name_on", ())
        else:
            wanted = name in arguments.kernels
        for_all = check.kernels is None or name in check.kernels
        if wanted and for_all and kernel.why_not(trial.spec) is None:
            found[name] = kernel
    return found


def verdict(check: Check, trial: Trial, name: str, kernel: Any) -> dict[str, Any]:
    """What is to be said of one kernel on one trial."""
    backward, dtype = trial.differentiable, trial.spec.dtype
    first, second = (execute(trial, kernel, dtype, backward=backward) for _ in range(2))
    once, again = first.tensors, second.tensors
    definition = check.reference or reference_of(trial)
    expected = execute(trial, definition, torch.float64, backward=backward).tensors
    errors = {key: distance(x, expected[key]) for key, x in once.items() if key in expected}
    worst = max(errors, key=errors.__getitem__)
    limit = TOLERANCE[dtype] * 2 ** BITS_LOST.get(name, 0)
    changed = [key for key, x in once.items() if not torch.equal(x, again[key])]
    promised = why_it_varies(kernel, trial.spec.device) is None
    right = errors[worst] < limit  # false for NaN
    return {
        "ok": right and not (changed if promised else set(changed) & set(first.outputs)),
        "worst": worst,
        "error": errors[worst],
        "limit": limit,
        "same_bits": not changed,
        "changed": changed,
        "promised": promised,
        "words": f"{worst} {errors[worst]:.1e} of {limit:.0e}"
        + (f"; {', '.join(changed)} not the same bits twice" if changed else ""),
    }


def examine(check: Check, arguments: Arguments) -> Iterator[dict[str, Any]]:
    """A row for every kernel that serves one check, or for the check that could not be made."""
    row: dict[str, Any] = {"op": check.op, "check": check.name, "kernel": "-"}
    begin = time.perf_counter()
    try:
        trial = check.make()
    except Exception as error:  # noqa: BLE001  (the other checks go on)
        yield row | failure(error) | {"seconds": time.perf_counter() - begin}
        return
    row["dtype"] = str(trial.spec.dtype)
    for name, kernel in serving(check, trial, arguments).items():
        forget_graphs()
        begin = time.perf_counter()
        try:
            found = verdict(check, trial, name, kernel)
        except Exception as error:  # noqa: BLE001  (a kernel may raise anything: report it)
            found = failure(error)
        yield row | {"kernel": name} | found | {"seconds": time.perf_counter() - begin}
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


def failure(error: Exception) -> dict[str, Any]:
    """What is to be said of something that raises."""
    words = f"it raises {type(error).__name__}: {str(error)[:300]}"
    return {"ok": False, "words": words, "where": traceback.format_exc()[-1500:]}


def run(arguments: Arguments) -> int:
    """Checks, prints and writes; 1 when something is wrong."""
    figures = Figures(arguments.json)
    wrong = count = 0
    for check in chosen(arguments):
        for row in examine(check, arguments):
            figures.add(row)
            count, wrong = count + 1, wrong + (not row["ok"])
            mark = "ok  " if row["ok"] else "FAIL"
            say(
                f"{mark} {row['op']:<20} {row['kernel']:<13} {row['check']:<58} {row['words']}  "
                f"({row['seconds']:.1f} s)"
            )
    say(f"{count} checks, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    enter(Arguments, run, "numerics")
