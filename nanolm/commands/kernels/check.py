"""`nanolm kernels check`: the conformance suite for your kernel; exit status 1 if it fails.

nanolm kernels check --module my_package.my_kernel
nanolm kernels check --op attention --name sdpa

A Triton kernel is first watched in Triton's interpreter: bounds, races between programs, lanes that
a mask leaves undefined. All of it is done by processes of their own, so that a kernel which ends
the process that runs it fails a check and does not end the others. What was found until an
interruption is printed, and written to --json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from typing import Any, Literal

import torch

from nanolm.commands.json_file import write_json
from nanolm.commands.signals import ended_in_order
from nanolm.config.ranges import Count
from nanolm.distributed.devices import device_type
from nanolm.errors import UserError
from nanolm.ops.contract import candidates
from nanolm.registry import KERNELS, OPS
from nanolm.terminal import say
from nanolm.tools.kernel_check.apart import (
    PATIENCE,
    Elsewhere,
    Here,
    ProcessEndedError,
    Worker,
)
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.examination import Find, Subject, examine
from nanolm.tools.kernel_check.interpreter import interpreted, prepare_interpreter
from nanolm.tools.kernel_check.report import Report, Status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which kernel to check."""

    module: str | None = None
    """Module that registers kernels (`my_package.my_kernel`): all of its kernels are checked."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Several such modules, under the name that a config and the other commands have for them."""
    op: str | None = None
    """Or the op …"""
    name: str | None = None
    """… and the registered name of one kernel, of a module that is named too or a built-in one."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run it."""
    quick: bool = False
    """Only features one by one, not the hard combinations."""
    apart: bool = True
    """Check in processes of their own; false checks in this one, for a debugger: a kernel that ends
    it ends the command."""
    seconds: Count = int(PATIENCE)
    """After how many seconds a check that has not ended is stopped, and fails."""
    json: str | None = None
    """Also write the findings here."""

    def __post_init__(self) -> None:
        device_type(self.device)  # refuses one that is not here

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that are named."""
        return tuple(dict.fromkeys([*filter(None, [self.module]), *self.plugins]))


def require_names(arguments: Arguments) -> None:
    """Raises UserError, before a process starts, when the arguments name no kernel."""
    op, name = arguments.op, arguments.name
    if op is None and name is None and arguments.modules:
        return
    if op is None:
        what = "name a kernel: --module MODULE, or --op and --name"
        if name is not None:
            what = f"name: {name} of which op? --op and --name name a kernel together"
        raise UserError(f"{what} (ops: {', '.join(OPS)})")
    if op not in OPS:
        near = difflib.get_close_matches(op, OPS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"choose from {', '.join(OPS)}"
        raise UserError(f"op: there is no op {op!r}; {meant}")
    if name is None:
        kernels = ", ".join(KERNELS[op].names())
        raise UserError(f"name: which kernel of {op}? --name takes one of {kernels}")
    if name not in KERNELS[op].names() and not arguments.modules:
        kernels = ", ".join(candidates(op))
        raise UserError(
            f"name: there is no {op} kernel {name!r}; choose from {kernels}, or name the module "
            f"that registers it: --module MODULE"
        )


class Workers:
    """Who checks, and who interprets: one worker where kernels are interpreted anyway."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.worker = self.made({})
        self.second: Worker | None = None

    def made(self, environment: dict[str, str]) -> Worker:
        """A worker with these variables in its environment."""
        a = self.arguments
        device = "cpu" if environment else a.device
        if not a.apart and not environment:
            prepare_interpreter()
            return Here()
        return Elsewhere(device, environment=environment, patience=a.seconds)

    def subjects(self) -> list[Subject]:
        """The kernels that the arguments name; whoever starts after this imports their modules."""
        a = self.arguments
        found: list[Subject] = ask_for(self.worker, Find(a.modules, a.op, a.name))
        if isinstance(self.worker, Elsewhere):
            self.worker.plugins = a.modules
        return found

    def interpreter(self) -> Worker:
        """The worker that interprets."""
        if interpreted():
            return self.worker
        if self.second is None:
            made = self.made({"TRITON_INTERPRET": "1"})
            assert isinstance(made, Elsewhere)
            made.plugins = self.arguments.modules
            self.second = made
        return self.second

    def close(self) -> None:
        """Ends them."""
        self.worker.close()
        if self.second is not None:
            self.second.close()


def ask_for(worker: Worker, find: Find) -> list[Subject]:
    """The kernels; raises UserError when importing their modules ends the process."""
    try:
        return worker.ask(find)
    except ProcessEndedError as error:
        names = ", ".join(find.modules)
        raise UserError(f"module: the process that imports {names} {error}") from None


def run(arguments: Arguments) -> None:
    """Check; exits 1 when a check fails, and when a kernel passes none."""
    require_names(arguments)
    workers, status = Workers(arguments), Status()
    record: list[dict[str, Any]] = []
    wrong = False
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_in_order())
        stack.callback(lambda: write_json(arguments.json, record))
        stack.callback(workers.close)
        for subject in workers.subjects():
            found = checked(subject, arguments, workers, status, record)
            verdicts = {finding.verdict for finding in found}
            wrong |= "FAIL" in verdicts or "pass" not in verdicts
    if wrong:
        raise SystemExit(1)


def checked(
    subject: Subject,
    arguments: Arguments,
    workers: Workers,
    status: Status,
    record: list[dict[str, Any]],
) -> list[Finding]:
    """Prints and records one kernel's findings; an interruption is recorded among them."""
    report = Report(subject.op, subject.kernel, status)
    row = {"op": subject.op, "kernel": subject.kernel}
    stream = examine(
        subject,
        arguments.device,
        quick=arguments.quick,
        worker=workers.worker,
        interpreter=workers.interpreter,
        began=status,
    )
    try:
        for finding in stream:
            report.add(finding)
            record.append(row | dataclasses.asdict(finding))
    except (KeyboardInterrupt, SystemExit):
        stopped = Finding(status.now, "note", "interrupted: this check and those behind it")
        record.append(row | dataclasses.asdict(stopped))
        report.close()
        say(f"  interrupted at {status.now}")
        raise
    report.close()
    return report.found
