"""Progress of long work: a bar on a terminal, plain lines in a file or a pipe.

Both go to stderr, so that a command's stdout holds only its result.
"""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO

LINE_SECONDS = 5.0


class ProgressReport(Protocol):
    """What `prepare` tells about its work: phases, and how far each is."""

    def begin(self, phase: str, total: int, unit: str) -> None:
        """A phase of `total` units of work (bytes, shards, …) begins."""
        ...

    def advance(self, amount: int) -> None:
        """So much more of the phase is done."""
        ...

    def end(self) -> None:
        """The phase is over."""
        ...


class Silent:
    """Says nothing."""

    def begin(self, phase: str, total: int, unit: str) -> None: ...

    def advance(self, amount: int) -> None: ...

    def end(self) -> None: ...


class Lines:
    """A line when a phase begins and ends, and one every few seconds in between."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def begin(self, phase: str, total: int, unit: str) -> None:
        self.phase, self.total, self.unit, self.done = phase, total, unit, 0
        self.started = self.told = time.monotonic()

    def advance(self, amount: int) -> None:
        self.done += amount
        if time.monotonic() - self.told >= LINE_SECONDS:
            self.told = time.monotonic()
            share = 100 * self.done / max(1, self.total)
            self._print(f"{share:.0f} % of {self._amount(self.total)}")

    def end(self) -> None:
        seconds = time.monotonic() - self.started
        self._print(f"{self._amount(self.total)} in {seconds:.1f} s")

    def _amount(self, amount: int) -> str:
        return f"{amount / 1e6:.1f} MB" if self.unit == "bytes" else f"{amount} {self.unit}"

    def _print(self, text: str) -> None:
        print(f"{self.phase}: {text}", file=self.stream, flush=True)


class Bar:
    """One rich progress bar a phase."""

    def begin(self, phase: str, total: int, unit: str) -> None:
        from rich import console, progress  # noqa: PLC0415 (workers need none of it)

        amount = (
            [progress.DownloadColumn(), progress.TransferSpeedColumn()]
            if unit == "bytes"
            else [progress.MofNCompleteColumn(), progress.TextColumn(unit)]
        )
        self.bar = progress.Progress(
            progress.TextColumn("{task.description:<20}"),
            progress.BarColumn(),
            *amount,
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console.Console(stderr=True),
        )
        self.bar.start()
        self.task = self.bar.add_task(phase, total=total)

    def advance(self, amount: int) -> None:
        self.bar.advance(self.task, amount)

    def end(self) -> None:
        self.bar.update(self.task, completed=self.bar.tasks[0].total)
        self.bar.stop()


def default_progress() -> ProgressReport:
    """A bar when stderr is a terminal, lines otherwise."""
    return Bar() if sys.stderr.isatty() else Lines(sys.stderr)
