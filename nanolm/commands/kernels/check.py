"""`nanolm kernels check MODULE`: the conformance suite for your kernel; exit status 1 if it fails.

nanolm kernels check --module my_package.my_kernel
nanolm kernels check --op attention --name sdpa

A Triton kernel is also watched in Triton's interpreter, by a process of its own where this one
compiles: bounds, races between programs, lanes that a mask leaves undefined.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from nanolm.commands.json_file import write_json
from nanolm.config.load import import_plugins
from nanolm.distributed.devices import device_type
from nanolm.errors import UserError
from nanolm.ops.contract import candidates
from nanolm.registry import KERNELS, OPS
from nanolm.tables import beside
from nanolm.terminal import say
from nanolm.tools.kernel_check.conformance import Finding, check_kernel
from nanolm.tools.kernel_check.safety import (
    UNSAFE,
    has_triton,
    interpreted,
    memory_finding,
    prepare_interpreter,
    watched_elsewhere,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which kernel to check."""

    module: str | None = None
    """Module that registers kernels (`my_package.my_kernel`): all of its kernels are checked."""
    op: str | None = None
    """Or the op …"""
    name: str | None = None
    """… and the registered name of one kernel."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run it."""
    quick: bool = False
    """Only features one by one, not the hard combinations."""
    json: str | None = None
    """Also write the findings here."""

    def __post_init__(self) -> None:
        device_type(self.device)  # refuses one that is not here


def chosen(arguments: Arguments) -> list[tuple[str, str, Any]]:
    """(op, name, kernel) of what the arguments name."""
    if arguments.module is None:
        if arguments.op not in OPS or arguments.name is None:
            raise UserError(
                f"name a kernel: --module MODULE, or --op and --name (ops: {', '.join(OPS)})"
            )
        known = candidates(arguments.op)
        KERNELS[arguments.op].get(arguments.name)
        return [(arguments.op, arguments.name, known[arguments.name])]
    before = {op: set(candidates(op)) for op in OPS}
    import_plugins([arguments.module])
    found = [
        (op, name, kernel)
        for op in OPS
        for name, kernel in candidates(op).items()
        if name not in before[op] or type(kernel).__module__ == arguments.module
    ]
    if not found:
        raise UserError(f"{arguments.module} registers no kernel; decorate it with @ops.kernel(op)")
    return found


def findings_of(op: str, name: str, kernel: Any, arguments: Arguments) -> list[Finding]:
    """All findings about one kernel. Where kernels are interpreted memory comes first, and alone
    when the kernel would write where it must not; where they are compiled it comes last."""
    if interpreted():
        memory = memory_finding(op, kernel)
        if memory is not None and memory.words.endswith(UNSAFE):
            return [memory]
        found = check_kernel(op, kernel, arguments.device, quick=arguments.quick)
        return found if memory is None else [*found, memory]
    found = check_kernel(op, kernel, arguments.device, quick=arguments.quick)
    memory = watched_elsewhere(arguments.module, op, name) if has_triton(kernel) else None
    return found if memory is None else [*found, memory]


def show(op: str, name: str, findings: list[Finding]) -> None:
    """Print one kernel's findings."""
    say(f"{op}: {name}")
    for finding in findings:
        print(beside([finding.verdict, finding.check], [7, 34], finding.words))


def run(arguments: Arguments) -> None:
    """Check; exits 1 when a check fails, and when a kernel passes none."""
    prepare_interpreter()
    failed = 0
    record = []
    for op, name, kernel in chosen(arguments):
        findings = findings_of(op, name, kernel, arguments)
        show(op, name, findings)
        counts = {v: sum(f.verdict == v for f in findings) for v in ("pass", "FAIL", "refused")}
        noted = sum(f.verdict == "note" for f in findings)
        words = f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['refused']} refused"
        say(f"  {words}{f', {noted} noted' if noted else ''}")
        if not counts["pass"]:
            say("  it passed no check: of a kernel that refuses everything nothing is known")
        failed += counts["FAIL"] + (not counts["pass"])
        record += [{"op": op, "kernel": name} | dataclasses.asdict(f) for f in findings]
    write_json(arguments.json, record)
    if failed:
        raise SystemExit(1)
