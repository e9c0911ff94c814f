"""`nanolm kernels doctor`: the first thing to run on a new GPU.

Every kernel that can serve this device is checked against its reference there, and a table says
what `auto` will choose. Exit status 1 when a kernel is wrong: then name another one in `kernels:`.

Kernels are compiled when they are first called, hundreds of them: `--jobs` processes share the
checks, and say what one would.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch

from nanolm.commands.figures import write_json
from nanolm.commands.kernels import list as kernels_list
from nanolm.errors import require_at_least
from nanolm.ops.contract import OPS, candidates, choose
from nanolm.tools.devices import DeviceWord, device_type
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.workers import errands, findings

MOST_JOBS = 8
"""Processes that share a GPU unless `jobs` says otherwise: each holds a context there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to look."""

    device: DeviceWord = "auto"
    """auto takes CUDA when there is any."""
    quick: bool = True
    """Features one by one; false adds the hard combinations."""
    jobs: int | None = None
    """Processes that share the checks; null means as many as cores on CUDA, up to 8, and 1 on a
    CPU."""
    json: str | None = None
    """Also write the verdicts here."""

    def __post_init__(self) -> None:
        require_at_least("kernels doctor", self, jobs=1)


def describe(device: str) -> str:
    """Device and versions, in one line."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, {triton_version()}"


def triton_version() -> str:
    """Triton's version by the module itself: it comes in packages of several names."""
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    return f"triton {importlib.import_module('triton').__version__}"


@dataclasses.dataclass(frozen=True)
class Patient:
    """A kernel that can serve the device, and whether `auto` takes it."""

    op: str
    kernel: str
    auto: bool


def patients(device: str) -> list[Patient]:
    """All kernels to check, op by op."""
    found = []
    for op in OPS:
        spec = kernels_list.typical(op, kernels_list.Arguments(device=device))
        if spec is None:
            continue
        chosen = choose(op, spec).kernel.name
        for name, kernel in candidates(op).items():
            if name != "reference" and kernel.why_not(spec) is None:
                found.append(Patient(op, name, name == chosen))
    return found


def verdict(patient: Patient, found: Sequence[Finding]) -> dict[str, Any]:
    """Prints a kernel's line, and one for each failure; the row of the report."""
    wrong = [finding for finding in found if finding.verdict == "FAIL"]
    passed = sum(finding.verdict == "pass" for finding in found)
    mark = "  <- auto" if patient.auto else ""
    counts = f"{passed:>3} passed {len(wrong):>3} failed{mark}"
    print(f"{patient.op:<21} {patient.kernel:<14} {counts}", flush=True)
    for finding in wrong:
        print(f"    {finding.check}: {finding.words}", flush=True)
    return dataclasses.asdict(patient) | {"passed": passed, "failed": len(wrong)}


def run(arguments: Arguments) -> None:
    """Check and print; exits 1 when a kernel fails."""
    device = device_type(arguments.device)
    print(describe(device), flush=True)
    waiting = {
        patient: errands(patient.op, patient.kernel, device, quick=arguments.quick)
        for patient in patients(device)
    }
    jobs = arguments.jobs or default_jobs(device)
    stream = findings([errand for todo in waiting.values() for errand in todo], jobs)
    verdicts = [
        verdict(patient, list(itertools.islice(stream, len(todo))))
        for patient, todo in waiting.items()
    ]
    write_json(arguments.json, verdicts)
    if any(row["failed"] for row in verdicts):
        raise SystemExit(1)


def default_jobs(device: str) -> int:
    """As many processes as cores compile for a GPU, up to a limit; a CPU computes with one."""
    return 1 if device == "cpu" else min(os.cpu_count() or 1, MOST_JOBS)
