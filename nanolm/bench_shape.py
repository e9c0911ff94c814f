"""What all contestants of a benchmark share: the shape, the clock, the memory gauge."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One model and batch, the same for every contestant."""

    n_layers: int = 6
    """Blocks."""
    d_model: int = 384
    """Width."""
    n_heads: int = 6
    """Heads."""
    row_length: int = 256
    """Tokens of a row."""
    batch: int = 16
    """Rows of a step."""
    vocab_size: int = 8192
    """Tokens of the vocabulary."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.row_length

    @property
    def n_masked(self) -> int:
        """Masked positions of a row in MLM: 15 % of all but <cls> and <sep>."""
        return round(0.15 * (self.row_length - 2))


class Step(Protocol):
    """A contestant: called once a step, it marks the phases on the clock, and returns figures."""

    n_parameters: int

    def __call__(self, clock: Clock) -> dict[str, Any]: ...


PHASES = ("data", "forward", "loss", "backward", "optimizer")


class Clock:
    """Seconds of each phase of the current step; a phase ends at its mark.

    A phase without a mark (forward, where a compiled graph holds the loss too) counts to the next.
    """

    def __init__(self) -> None:
        self.step = 0
        self.phases: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # of all threads: what other processes disturb less

    def start(self) -> None:
        """A step begins."""
        self._begin = self._last = time.perf_counter()
        self._cpu = time.process_time()
        self._now: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """`phase` has ended."""
        now = time.perf_counter()
        self._now[phase] = self._now.get(phase, 0.0) + now - self._last
        self._last = now

    def stop(self) -> None:
        """The step has ended."""
        self.seconds.append(time.perf_counter() - self._begin)
        self.cpu_seconds.append(time.process_time() - self._cpu)
        self.phases.append(self._now)
        self.step += 1

    def last(self, count: int) -> dict[str, Any]:
        """seconds and cpu_seconds of the last steps (at least one), and each phase's median."""
        steps = self.phases[-count:]
        phases = {
            phase: statistics.median(times[phase] for times in steps)
            for phase in PHASES
            if phase in steps[0]
        }
        seconds, cpu_seconds = self.seconds[-count:], self.cpu_seconds[-count:]
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "phases": phases}


def take_steps(step: Step, clock: Clock, count: int) -> dict[str, Any]:
    """Takes steps by the clock: their times, their figures as lists, the peak of memory so far."""
    found = []
    for _ in range(count):
        clock.start()
        found.append(step(clock))
        clock.stop()
    figures = {key: [figures[key] for figures in found] for key in found[0]}
    return clock.last(count) | figures | {"peak_bytes": resident_bytes(peak=True)}


def resident_bytes(*, peak: bool) -> int:
    """Resident set of this process now, or its highest since `forget_peak` (Linux)."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def forget_peak() -> None:
    """Sets the peak of the resident set to what is resident now (proc(5), clear_refs)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
