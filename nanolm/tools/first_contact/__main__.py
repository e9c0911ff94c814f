"""`make gpu`: everything that a first look at a GPU is to tell, within a budget of time.

    python -m nanolm.tools.first_contact --out runs/gpu [--part 1] [--minutes 9] [--device cpu]

Needs a checkout and the Python that has torch: no installation, no network. Each stage (see
`stages.py`) is a process of its own with a time limit, so that memory is free again behind it and
one that hangs costs its own time only. What an earlier call has finished on a device of the same
name is kept. Exits with 1 when a stage failed or was not begun.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from nanolm.config.load import parse
from nanolm.errors import UserError, require
from nanolm.terminal import say
from nanolm.tools.first_contact.entry import Entry
from nanolm.tools.first_contact.report import Report, entry_of, forget
from nanolm.tools.first_contact.runner import run_together
from nanolm.tools.first_contact.stages import PARTS, Stage, Table

ROOT = pathlib.Path(__file__).resolve().parents[3]
LEAST = 20.0
"""Seconds below which no further stage is begun."""
RESERVE = 5.0
"""Seconds of the budget that are kept for writing the report."""
MOST_JOBS = 12
"""Processes that share a GPU: each holds a context of half a gigabyte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to do, where, and for how long."""

    out: str
    """Folder for report.txt, report.json and logs.tar.gz."""
    part: int | None = None
    """1, 2 or 3; null takes one after another, each with its own budget."""
    only: list[str] | None = None
    """Only these stages, whatever their part; null means the part's."""
    minutes: float = 9.0
    """Budget of a part, this program's own start included."""
    device: str = "cuda"
    """cuda; cpu is a dry run of the same stages with tiny sizes."""
    jobs: int = min(MOST_JOBS, os.cpu_count() or 1)
    """Processes that share the checks of kernels, which take their time to compile."""
    fresh: bool = False
    """Throw away what `out` holds, and do everything anew."""

    def __post_init__(self) -> None:
        require(self.part in (None, *PARTS), f"part={self.part}: choose from 1, 2, 3")
        require(self.device in ("cuda", "cpu"), f"device={self.device}: choose from cuda, cpu")
        require(self.minutes > 0, f"minutes={self.minutes} must be positive")
        require(self.jobs >= 1, f"jobs={self.jobs} must be at least 1")


def chosen(arguments: Arguments, stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages of each part that is to be done; `machine`, which the others' entries need to say
    where they were, comes first in each. Raises UserError for a name that is no stage's."""
    machine, *others = stages
    if arguments.only is not None:
        names = [stage.name for stage in stages]
        for name in arguments.only:
            require(
                name in names, f"only: there is no stage {name!r}; there are {', '.join(names)}"
            )
        return [[machine, *(stage for stage in others if stage.name in arguments.only)]]
    parts = PARTS if arguments.part is None else (arguments.part,)
    return [[machine, *(stage for stage in others if stage.part == part)] for part in parts]


def environment() -> dict[str, str]:
    """For every stage: this checkout, output as it comes, no network, and compilers' caches that
    all stages and calls share."""
    caches = pathlib.Path(tempfile.gettempdir()) / f"nanolm-first-contact-{os.getuid()}"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    outside = {key: value for key, value in os.environ.items() if key != "COLUMNS"}  # lines of logs
    return outside | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }


def do_stage(stage: Stage, logs: pathlib.Path, limit: float, variables: dict[str, str]) -> Entry:
    """Runs a stage and says what became of it."""
    reason = stage.why_not()
    if reason is not None:
        return Entry(name=stage.name, part=stage.part, verdict="left out", words=reason)
    forget(logs, stage.commands)
    limit, began = min(stage.limit, limit), time.monotonic()
    # A stage that is killed cannot clear away its temporary files.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        variables = variables | {"TMPDIR": scratch}
        if len(stage.commands) > 1:  # they share the cores, also those that compile
            cores = str(max((os.cpu_count() or 1) // len(stage.commands), 1))
            variables |= {"OMP_NUM_THREADS": cores, "TORCHINDUCTOR_COMPILE_THREADS": cores}
        ended = run_together(stage.commands, logs, limit, variables, ROOT)
    return entry_of(stage, ended, time.monotonic() - began, limit)


def do_part(stages: Sequence[Stage], report: Report, end: float, order: list[str]) -> list[Entry]:
    """Does the stages one after another until the end of the budget; their entries. Raises
    UserError when even the first, the machine, fails."""
    variables, found, device = environment(), [], ""
    for number, stage in enumerate(stages):
        if number > 0 and report.done(stage.name, device):
            found.append(report.entries[stage.name])
            continue
        left = end - time.monotonic() - RESERVE
        if left < LEAST:
            words = "the budget is spent"
            entry = Entry(name=stage.name, part=stage.part, verdict="not begun", words=words)
        else:
            entry = do_stage(stage, report.logs, left, variables)
        if number == 0:
            device = device_of(entry)
        entry = dataclasses.replace(entry, device=device)
        if entry.verdict != "not begun" or stage.name not in report.entries:
            report.add(entry, order)  # what an earlier call has seen is more than nothing
        say("\n".join(entry.text()))
        found.append(entry)
        said = entry.lines[-1] if entry.lines else entry.words
        require(number > 0 or entry.verdict == "ok", f"the stage machine failed: {said}")
    return found


def device_of(machine: Entry) -> str:
    """The device's name, as the first stage has found it."""
    rows = [row for rows in machine.figures.values() for row in rows]
    return rows[0]["device"] if rows else ""


def run(arguments: Arguments, start: float) -> int:
    """All parts that are asked for; 1 when a stage failed or was not begun."""
    require(
        (ROOT / "configs").is_dir(),
        f"{ROOT} is no checkout of nanolm: this runs where README.md, configs/ and nanolm/ stand",
    )
    with tempfile.TemporaryDirectory(prefix="nanolm-gpu-") as folder:
        logs = pathlib.Path(folder) / "logs"
        logs.mkdir()
        report = Report(pathlib.Path(arguments.out), logs, arguments.fresh)
        stages = Table(arguments.device, arguments.jobs, logs).stages()
        entries: list[Entry] = []
        try:
            for part in chosen(arguments, stages):
                end = start + 60 * arguments.minutes
                entries += do_part(part, report, end, [stage.name for stage in stages])
                start = time.monotonic()
        finally:
            packed = report.pack()
    say(f"\n{report.folder}: report.txt, report.json, logs.tar.gz ({packed})")
    return int(any(entry.verdict in ("FAIL", "not begun") for entry in entries))


def leave(number: int, _: Any) -> None:
    """A signal's handler: the stage that runs is ended, and the report written."""
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point: a user's mistake is one sentence on stderr and exit status 2."""
    start = time.monotonic()
    signal.signal(signal.SIGTERM, leave)
    try:
        status = run(
            parse(Arguments, sys.argv[1:], prog="python -m nanolm.tools.first_contact"), start
        )
    except UserError as error:
        print(f"nanolm.tools.first_contact: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    raise SystemExit(status)


if __name__ == "__main__":
    main()
