"""The instruments of a benchmark's contestant on its device: clock, memory gauge, and how a turn of
steps is taken.

    Clock       a CPU: a call returns when its work is done, so each step is timed alone, and its
                phases by the same clock
    CudaClock   a GPU: a call returns when its work is in the queue. The steps of a turn run freely
                and only their end is waited for, as in training; their mean counts. Then as many
                steps are taken with a wait after each. Phases are the device's time between marks,
                from CUDA events, which nothing waits for: a host that is late lengthens the phase
                in which the device runs dry.

The contestants of a contest are all ready at once, and one device's memory does not hold the
activations of all: on CUDA a turn begins with a step that does not count, in which the allocator
takes memory, and ends by giving back all that is not in use.
"""

from __future__ import annotations

import itertools
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

from nanolm.distributed.devices import device_type
from nanolm.tools.bench.cells import device_name
from nanolm.tools.bench.shape import PHASES
from nanolm.training.throughput import peak_flops


class Step(Protocol):
    """A contestant: called once a step, it marks the phases on the clock, and returns figures:
    numbers, or tensors of one number, which are read when the turn is over."""

    n_parameters: int

    def __call__(self, clock: Clock) -> dict[str, Any]: ...


class Clock:
    """Seconds of each phase of each step on a CPU; a phase ends at its mark.

    A phase without a mark (forward, where a compiled graph holds the loss too) counts to the next.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
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

    def take(self, step: Step) -> dict[str, Any]:
        """Takes one step by the clock; its figures."""
        self.start()
        figures = step(self)
        self.stop()
        return figures

    def turn(self, step: Step, count: int) -> dict[str, Any]:
        """Takes the steps of a turn: `seconds` and `cpu_seconds` of each, each phase's median
        seconds, the steps' own figures, and the peak of memory so far in bytes."""
        figures = listed([self.take(step) for _ in range(count)])
        times = {"seconds": self.seconds[-count:], "cpu_seconds": self.cpu_seconds[-count:]}
        return times | {"phases": medians(self.phases[-count:])} | figures | self.memory()

    def wait(self) -> None:
        """Returns when all work is done, which on a CPU it is."""

    def held_before(self, toy: Callable[[], Any]) -> int:
        """Bytes that the process holds before its model: libraries, and all that `toy` loads."""
        toy()
        return resident_bytes(peak=False)

    def forget_peak(self) -> None:
        """Sets the peak of the resident set to what is resident now (proc(5), clear_refs)."""
        pathlib.Path("/proc/self/clear_refs").write_text("5")

    def memory(self) -> dict[str, int]:
        """`peak_bytes` of the resident set since `forget_peak`."""
        return {"peak_bytes": resident_bytes(peak=True)}

    @property
    def name(self) -> str:
        """The device's name."""
        return device_name(self.device.type)

    def count_waits(self, step: Step) -> int | None:
        """How often a step makes the host wait for the device; None where they are one."""
        return None

    def data_sheet_peak(self, precision: str) -> float | None:
        """FLOP/s of matrix products by the maker's data sheet; None: no sheet says it."""
        return None


class CudaClock(Clock):
    """The same on the first CUDA device that torch sees."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", 0)
        self._marks: list[list[tuple[str, torch.cuda.Event]]] = []

    def start(self) -> None:
        """A step begins."""
        self._marks.append([("", self._event())])

    def mark(self, phase: str) -> None:
        """`phase` has ended on the device when it gets here."""
        self._marks[-1].append((phase, self._event()))

    def stop(self) -> None:
        """The step is in the queue."""
        self.step += 1

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def turn(self, step: Step, count: int) -> dict[str, Any]:
        """Takes the steps of a turn, running freely: their mean stands for each in `seconds`, with
        a wait after each in `waited_seconds`; `reserved_bytes` beside `peak_bytes`."""
        self.take(step)
        self.wait()
        self._marks.clear()
        begin, cpu = time.perf_counter(), time.process_time()
        found = [self.take(step) for _ in range(count)]
        self.wait()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        phases = medians([durations(marks) for marks in self._marks])
        times = {
            "seconds": [seconds / count] * count,
            "cpu_seconds": [cpu_seconds / count] * count,
            "waited_seconds": [self._take_and_wait(step) for _ in range(count)],
        }
        memory = self.memory()
        torch.cuda.empty_cache()
        return times | {"phases": phases} | listed(found) | memory

    def _take_and_wait(self, step: Step) -> float:
        begin = time.perf_counter()
        self.take(step)
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Returns when the device has done all that is in its queues."""
        torch.cuda.synchronize(self.device)

    def held_before(self, toy: Callable[[], Any]) -> int:
        """Bytes that PyTorch's allocator has given out before the model: libraries are not in it,
        so no toy is needed."""
        return torch.cuda.memory_allocated(self.device)

    def forget_peak(self) -> None:
        """Gives back all that is not in use, and starts the allocator's gauge anew from the rest:
        the last thing before a contestant waits for its turn."""
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> dict[str, int]:
        """Since `forget_peak`: `peak_bytes` in tensors, `reserved_bytes` with what the allocator
        kept for later."""
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(self.device),
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }

    def count_waits(self, step: Step) -> int | None:
        """How often a step makes the host wait for the device, as far as PyTorch notices."""
        self.wait()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.take(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)

    def data_sheet_peak(self, precision: str) -> float | None:
        """FLOP/s of dense matrix products by the maker's data sheet; None for a GPU that is not in
        the table (nanolm/training/accelerators.py)."""
        return peak_flops(self.device, precision)[0]


def clock_on(device: str) -> Clock:
    """The clock of a device: auto, cpu or cuda. Raises UserError for cuda where there is none."""
    return {"cpu": Clock, "cuda": CudaClock}[device_type(device)]()


def listed(found: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The figures of steps (at least one) as a list for each; tensors are read only here."""
    return {key: [number(figures[key]) for figures in found] for key in found[0]}


def number(figure: Any) -> Any:
    """A figure for JSON: a tensor's number, read from its device."""
    return figure.item() if isinstance(figure, torch.Tensor) else figure


def durations(marks: list[tuple[str, torch.cuda.Event]]) -> dict[str, float]:
    """Seconds of each phase between the events of one step."""
    phases: dict[str, float] = {}
    for (_, before), (phase, event) in itertools.pairwise(marks):
        phases[phase] = phases.get(phase, 0.0) + before.elapsed_time(event) / 1e3
    return phases


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Each phase's median over the steps, in the order of a step."""
    return {
        phase: statistics.median(times[phase] for times in steps)
        for phase in PHASES
        if phase in steps[0]
    }


def resident_bytes(*, peak: bool) -> int:
    """Resident set of this process now, or its highest since `forget_peak` (Linux)."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
