"""How long the device works on a call, whatever the host needs to launch it.

On a GPU the time between two CUDA events around the call. Before each call the L2 cache is written
over, so that inputs come from memory as in a training step; and the GPU first sleeps for a moment
in which the host queues the whole call, so that no launch is waited for. On a CPU it is the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3
"""Calls that do not count: they compile, and fill the allocator's cache."""
FLUSHED = 256 * 2**20
"""Bytes that are written over: more than the L2 cache of any GPU."""
HEAD_START = 4_000_000
"""Clock cycles that the GPU sleeps, about two milliseconds."""


def milliseconds(function: Callable[[], Any], device: str, repetitions: int) -> float:
    """Median time of a call on the device type, after some to warm up."""
    for _ in range(WARM_UP):
        function()
    times = on_cuda(function, repetitions) if device == "cuda" else on_cpu(function, repetitions)
    return statistics.median(times)


def on_cpu(function: Callable[[], Any], repetitions: int) -> list[float]:
    """Wall-clock milliseconds of each call."""
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def on_cuda(function: Callable[[], Any], repetitions: int) -> list[float]:
    """Milliseconds of device time of each call."""
    cache = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(HEAD_START)
        begin.record()
        function()
        end.record()
        end.synchronize()  # what the call allocated may go before the next one
        pairs.append((begin, end))
    return [begin.elapsed_time(end) for begin, end in pairs]
