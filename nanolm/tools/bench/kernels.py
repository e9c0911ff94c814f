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
from rich.console import Console
from torch import Tensor

from nanolm.ops.contract import candidates
from nanolm.ops.kept import spec_record
from nanolm.ops.timings import device_name
from nanolm.tables import beside, tables
from nanolm.tools.first_contact.device_time import milliseconds
from nanolm.tools.kernel_check.interpreter import counted_launches, interpreted
from nanolm.tools.kernel_check.problems import PROBLEMS, Problem, Sizes


def call(problem: Problem, kernel: Any, sizes: Sizes) -> list[Tensor]:
    """Outputs and gradients of one call, under autocast in 16 bits."""
    dtype = getattr(torch, sizes.dtype)
    narrow = dtype != torch.float32
    with torch.autocast(sizes.device, dtype) if narrow else contextlib.nullcontext():
        outputs = problem.run(kernel)
    if not problem.backward:
        return outputs
    ones = [torch.ones_like(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, problem.leaves, ones)]


def seconds_of(function: Callable[[], Any], device: str) -> tuple[float, float]:
    """Wall-clock seconds of one call: until it returns, and to its end on the device."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    returned = time.perf_counter() - start
    synchronize()
    return returned, time.perf_counter() - start


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
        if reason is None and would_be_interpreted(problem, kernel, a):
            reason = "it would be interpreted here"
        if reason is None:
            serving[name] = kernel
        else:
            table.append({"op": op, "kernel": name, "left_out": reason})
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in serving}
    for _ in range(repetitions + 1):  # the first round warms up
        for name, kernel in serving.items():
            times[name].append(seconds_of(functools.partial(call, problem, kernel, a), a.device))
    for name, kernel in serving.items():
        host, seconds = (statistics.median(column) for column in zip(*times[name][1:], strict=True))
        results = call(problem, kernel, a)
        moved = problem.n_bytes(results)
        del results
        table.append(
            {
                "op": op,
                "kernel": name,
                "problem": problem.words,
                "passes": "forward and backward" if problem.backward else "forward",
                "spec": spec_record(problem.spec),
                "device_name": device_name(a.device),
                "ms": 1e3 * seconds,
                "host_us": 1e6 * host,
                "device_ms": device_ms(
                    functools.partial(call, problem, kernel, a), a.device, repetitions
                ),
                "tflops": None if problem.flops is None else problem.flops / seconds / 1e12,
                "gb_per_s": moved / seconds / 1e9,
                "peak_mb": peak_bytes(functools.partial(call, problem, kernel, a), a.device) / 1e6,
            }
        )
    return table


def would_be_interpreted(problem: Problem, kernel: Any, sizes: Sizes) -> bool:
    """Whether the kernel says so, or a call of it launches what Triton's interpreter runs."""
    if sizes.device in getattr(kernel, "only_by_name_on", ()):
        return True
    if not interpreted():
        return False
    with counted_launches() as launches:
        call(problem, kernel, sizes)
    return bool(launches)


def device_ms(function: Callable[[], Any], device: str, repetitions: int) -> float | None:
    """Milliseconds of device time of a call; None on a CPU, which has no other than the host's."""
    return milliseconds(function, device, repetitions) if device == "cuda" else None


def timings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were measured, as `ops.timings` keeps them: by device time where it differs."""
    keys = ("op", "kernel", "device_name", "problem", "spec")
    return [
        {key: row[key] for key in keys} | {"ms": row["device_ms"] or row["ms"]}
        for row in rows
        if "left_out" not in row
    ]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows of one op as a table; below it why the others are left out."""
    measured = [row for row in rows if "left_out" not in row]
    device = any(row.get("device_ms") for row in measured)  # a CPU has no time of its own
    columns = {name: text for name, text in COLUMNS.items() if device or name != "device ms"}
    cells = [[row["kernel"], *(text(row) for text in columns.values())] for row in measured]
    for made in tables(["kernel", *columns], cells) if cells else []:
        console.print(made)
    for row in rows:
        if "left_out" in row:
            print(beside([row["kernel"]], [14], f"left out: {row['left_out']}"))


def figure(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    """How a row's figure is written; a dash where it has none."""
    return lambda row: "-" if row.get(key) is None else format(row[key], form)


COLUMNS = {
    "ms": figure("ms", ".2f"),
    "host µs": figure("host_us", ".0f"),
    "device ms": figure("device_ms", ".3f"),
    "TFLOP/s": figure("tflops", ".3f"),
    "GB/s": figure("gb_per_s", ".2f"),
    "MB": figure("peak_mb", ".1f"),
}
