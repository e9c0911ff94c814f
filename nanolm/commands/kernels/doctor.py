"""`nanolm kernels doctor`: the first thing to run on a new GPU.

Every kernel that can serve this device is checked against its reference there, and a table says
what `auto` will choose. Exit status 1 when a kernel is wrong: then name another one in `kernels:`.

Kernels are compiled when they are first called, hundreds of them: `--jobs` processes share the
checks, and say what one would.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from nanolm.commands.json_file import write_json
from nanolm.commands.signals import ended_in_order
from nanolm.config.ranges import Count
from nanolm.distributed.devices import DeviceWord, device_type
from nanolm.terminal import say
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.report import Status, grouped, of_these
from nanolm.tools.kernel_check.survey import Patient, default_jobs, describe, survey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to look."""

    device: DeviceWord = "auto"
    """auto takes CUDA when there is any."""
    quick: bool = True
    """Features one by one; false adds the hard combinations."""
    jobs: Count | None = None
    """Processes that share the checks; null means as many as cores on CUDA, up to 8, and 1 on a
    CPU."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Modules with kernels of your own."""
    json: str | None = None
    """Also write the verdicts here."""


def verdict(patient: Patient, found: Sequence[Finding]) -> dict[str, Any]:
    """Prints a kernel's line, and one for each failure, equal ones together; the row of the
    report."""
    wrong = [finding for finding in found if finding.verdict == "FAIL"]
    passed = sum(finding.verdict == "pass" for finding in found)
    mark = "  <- auto" if patient.auto else ""
    counts = f"{passed:>3} passed {len(wrong):>3} failed{mark}"
    say(f"{patient.op:<21} {patient.kernel:<14} {counts}")
    told = [finding for finding in found if finding.verdict in ("FAIL", "note")]
    for first, *others in grouped(told):
        note = "note: " if first.verdict == "note" else ""
        also = f" ({of_these(first, others)})" if others else ""
        say(f"    {note}{first.check}: {first.words}{also}")
    return dataclasses.asdict(patient) | {"passed": passed, "failed": len(wrong)}


def run(arguments: Arguments) -> None:
    """Check and print; exits 1 when a kernel fails. What was found until an interruption is kept
    too."""
    device = device_type(arguments.device)
    say(describe(device))
    jobs = arguments.jobs or default_jobs(device)
    status = Status()
    verdicts: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_in_order())
        stack.callback(lambda: write_json(arguments.json, verdicts))
        stack.callback(status.clear)
        found = survey(
            device,
            quick=arguments.quick,
            jobs=jobs,
            plugins=arguments.plugins,
            began=status,
            note=say,
        )
        for patient, told in found:
            status.clear()
            verdicts.append(verdict(patient, told))
    if any(row["failed"] for row in verdicts):
        raise SystemExit(1)
