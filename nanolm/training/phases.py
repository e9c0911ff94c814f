"""Progress: what this rank is doing, and how its step times divide into phases.

    data            waiting for micro-batches
    forward         Learner.forward of all micro-batches
    backward        autograd; under DDP the all-reduce of early buckets runs beside it
    communication   waiting for other ranks: the target counts, what is left of the gradients'
                    all-reduce after the backward pass, agreeing on the loss
    optimizer       gradient norm, clipping, update, moving average

The trainer enters a phase where it begins; the one before it ends there. The watchdog reads the
same object from its own thread, to say where a rank hangs. On CUDA the times are those of the
device, from events, so that a phase is not charged with what an earlier one put in the queue.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nanolm.distributed.world import World

PHASES = ("data", "forward", "backward", "communication", "optimizer")
"""Phases of a step whose seconds stand in a metrics line, as `<phase>_seconds`."""


class Progress:
    """The present step and phase of this rank, and seconds per phase not yet taken."""

    def __init__(self, device: torch.device) -> None:
        self.step, self.phase = 0, "start"
        self.entries = 0
        self.changed = time.monotonic()
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # seconds, or on CUDA events
        self._steps = 0

    def enter(self, phase: str, step: int | None = None) -> None:
        """The phase begins now; `step` is the optimizer step it belongs to, when that changes."""
        if step is not None and step != self.step:
            self.step = step
            self._steps += 1
        self.phase = phase
        self.entries += 1
        self.changed = time.monotonic()
        self._marks.append((phase, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        # The host runs ahead of the device: its clock would say when work was asked for. An event
        # is passed by the device when the work before it is done.
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take_seconds(self) -> dict[str, float]:
        """Mean seconds of each phase per step since the last reading; waits for the device."""
        marks = [*self._marks, (self.phase, self._now())]
        if self._cuda:
            marks[-1][1].synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in itertools.pairwise(marks):
            if phase in seconds:
                seconds[phase] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        steps, self._steps = max(self._steps, 1), 0
        self._marks = [marks[-1]]
        return {f"{phase}_seconds": value / steps for phase, value in seconds.items()}


def own_seconds(figures: Mapping[str, float]) -> float:
    """Seconds of a step that a rank spent by itself: everything but waiting for others."""
    return sum(figures[f"{phase}_seconds"] for phase in PHASES if phase != "communication")


class StragglerMonitor:
    """Compares the ranks' own seconds per step, and says so when one stays behind."""

    SLOW = 1.5

    def __init__(self, world: World, note: Callable[[str], None]) -> None:
        self.world, self.note = world, note
        self._suspect: int | None = None
        self._told: set[int] = set()

    def compare(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The slowest rank and its step time over the median's; collective, empty in a world of
        one. A rank that is slow twice running is told of, once."""
        if self.world.size == 1:
            return {}
        slowest, ratio = straggler(self.world.gather(own_seconds(figures)))
        slow = slowest if ratio >= self.SLOW else None
        if slow is not None and slow == self._suspect and slow not in self._told:
            self._told.add(slow)
            self.note(f"rank {slow} is slow: its steps take {ratio:.1f} times the median rank's")
        self._suspect = slow
        return {"straggler": ratio, "slowest_rank": slowest}


def straggler(seconds: Sequence[float]) -> tuple[int, float]:
    """(slowest rank, its own seconds per step divided by the median rank's)."""
    slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
    others = sorted(seconds)
    median = others[(len(others) - 1) // 2]
    return slowest, seconds[slowest] / max(median, 1e-9)
