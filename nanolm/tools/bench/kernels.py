"""The kernels of one op beside each other: time, bytes that must move, peak memory of a call.

The kernels take turns, after one round of warming up.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanolm.ops.contract import candidates
from nanolm.tools.kernel_check.problems import PROBLEMS, Problem, Sizes, n_bytes


def call(problem: Problem, kernel: Any, sizes: Sizes) -> list[Tensor]:
    """Outputs and gradients of one call, under autocast in 16 bits."""
    dtype = getattr(torch, sizes.dtype)
    narrow = dtype != torch.float32
    with torch.autocast(sizes.device, dtype) if narrow else contextlib.nullcontext():
        outputs = problem.run(kernel)
    if not sizes.backward:
        return outputs
    ones = [torch.ones_like(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, problem.leaves, ones)]


def seconds_of(function: Callable[[], Any], device: str) -> float:
    """Wall-clock seconds of one call, to its end on the device."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """The most that PyTorch's allocator held during a call, beyond what it held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function()
    del kept
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def measure(op: str, sizes: Sizes, repetitions: int) -> list[dict[str, Any]]:
    """One row per kernel of the op: figures, or why it is left out."""
    a, problem = sizes, PROBLEMS[op](sizes)
    serving: dict[str, Any] = {}
    table: list[dict[str, Any]] = []
    for name, kernel in candidates(op).items():
        reason = kernel.why_not(problem.spec)
        if reason is None and a.device in getattr(kernel, "only_by_name_on", ()):
            reason = "it would be interpreted here"
        if reason is None:
            serving[name] = kernel
        else:
            table.append({"op": op, "kernel": name, "left_out": reason})
    times: dict[str, list[float]] = {name: [] for name in serving}
    for _ in range(repetitions + 1):  # the first round warms up
        for name, kernel in serving.items():
            times[name].append(seconds_of(functools.partial(call, problem, kernel, a), a.device))
    for name, kernel in serving.items():
        seconds = statistics.median(times[name][1:])
        results = call(problem, kernel, a)
        # The backward pass reads inputs and incoming gradients and writes the inputs' gradients.
        moved = n_bytes([*problem.leaves, *results])
        if a.backward:
            moved += n_bytes([*problem.leaves, *results[: -len(problem.leaves)]])
        del results
        table.append(
            {
                "op": op,
                "kernel": name,
                "problem": problem.words,
                "ms": 1e3 * seconds,
                "tflops": None if problem.flops is None else problem.flops / seconds / 1e12,
                "gb_per_s": moved / seconds / 1e9,
                "peak_mb": peak_bytes(functools.partial(call, problem, kernel, a), a.device) / 1e6,
            }
        )
    return table


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    if "left_out" in row:
        return f"  {row['kernel']:<14} left out: {row['left_out']}"
    tflops = "" if row["tflops"] is None else f"{row['tflops']:9.3f} TFLOP/s"
    return (
        f"  {row['kernel']:<14} {row['ms']:9.2f} ms {tflops:>17} {row['gb_per_s']:9.2f} GB/s "
        f"{row['peak_mb']:9.1f} MB"
    )
