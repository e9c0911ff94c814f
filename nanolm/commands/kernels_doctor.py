"""`nanolm kernels doctor`: the first thing to run on a new GPU.

Every kernel that can serve this device is checked against its reference there, and a table says
what `auto` will choose. Exit status 1 when a kernel is wrong: then name another one in `kernels:`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata

import torch

from nanolm.commands import kernels_list
from nanolm.commands.figures import write_json
from nanolm.kernel_check.conformance import check_kernel
from nanolm.ops import OPS, candidates, choose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to look."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device type."""
    quick: bool = True
    """Features one by one; false adds the hard combinations."""
    json: str | None = None
    """Also write the verdicts here."""


def describe(device: str) -> str:
    """Device and versions, in one line."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, triton {importlib.metadata.version('triton')}"
    return f"{name}, {versions}"


def run(arguments: Arguments) -> None:
    """Check and print; exits 1 when a kernel fails."""
    print(describe(arguments.device))
    verdicts = []
    for op in OPS:
        spec = kernels_list.typical(op, kernels_list.Arguments(device=arguments.device))
        if spec is None:
            continue
        chosen = choose(op, spec).kernel.name
        for name, kernel in candidates(op).items():
            if name == "reference" or kernel.why_not(spec) is not None:
                continue
            findings = check_kernel(op, kernel, arguments.device, quick=arguments.quick)
            wrong = [f for f in findings if f.verdict == "FAIL"]
            passed = sum(f.verdict == "pass" for f in findings)
            mark = "  <- auto" if name == chosen else ""
            print(f"{op:<21} {name:<14} {passed:>3} passed {len(wrong):>3} failed{mark}")
            for finding in wrong:
                print(f"    {finding.check}: {finding.words}")
            verdicts.append(
                {
                    "op": op,
                    "kernel": name,
                    "passed": passed,
                    "failed": len(wrong),
                    "auto": bool(mark),
                }
            )
    write_json(arguments.json, verdicts)
    if any(row["failed"] for row in verdicts):
        raise SystemExit(1)
