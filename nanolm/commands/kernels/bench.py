"""`nanolm kernels bench`: all kernels of an op beside each other on the device at hand.

    ms        median over repetitions, the kernels taking turns, after one round of warming up
    TFLOP/s   of the products that the op means (the visible half of a causal mask)
    GB/s      of the bytes that must move: inputs, outputs and their gradients, each once
    MB        the most that a call holds beside its inputs

On a CPU without the interpreter Triton is left out, with its reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanolm.commands.figures import write_json
from nanolm.config.load import import_plugins
from nanolm.errors import UserError
from nanolm.ops.contract import candidates
from nanolm.tools.kernel_check.problems import PROBLEMS, Problem, Sizes, n_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Sizes):
    """What to measure."""

    op: str = "all"
    """One op, or all."""
    repetitions: int = 7
    """Measurements of each kernel."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Modules with kernels of your own."""
    json: str | None = None
    """Also write the table here."""


def call(problem: Problem, kernel: Any, arguments: Arguments) -> list[Tensor]:
    """Outputs and gradients of one call, under autocast in 16 bits."""
    dtype = getattr(torch, arguments.dtype)
    narrow = dtype != torch.float32
    with torch.autocast(arguments.device, dtype) if narrow else contextlib.nullcontext():
        outputs = problem.run(kernel)
    if not arguments.backward:
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


def measure(op: str, arguments: Arguments) -> list[dict[str, Any]]:
    """One row per kernel of the op: figures, or why it is left out."""
    a, problem = arguments, PROBLEMS[op](arguments)
    serving, table = {}, []
    for name, kernel in candidates(op).items():
        reason = kernel.why_not(problem.spec)
        if reason is None and a.device in getattr(kernel, "only_by_name_on", ()):
            reason = "it would be interpreted here"
        if reason is None:
            serving[name] = kernel
        else:
            table.append({"op": op, "kernel": name, "left_out": reason})
    times: dict[str, list[float]] = {name: [] for name in serving}
    for _ in range(a.repetitions + 1):  # the first round warms up
        for name, kernel in serving.items():
            times[name].append(seconds_of(lambda k=kernel: call(problem, k, a), a.device))
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
                "peak_mb": peak_bytes(lambda k=kernel: call(problem, k, a), a.device) / 1e6,
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


def run(arguments: Arguments) -> None:
    """Measure and print, op by op."""
    import_plugins(arguments.plugins)
    if arguments.op not in ("all", *PROBLEMS):
        raise UserError(f"--op {arguments.op}: choose from all, {', '.join(PROBLEMS)}")
    if arguments.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {arguments.dtype}: choose from float32, bfloat16, float16")
    passes = "forward and backward" if arguments.backward else "forward"
    table = []
    for op in PROBLEMS if arguments.op == "all" else [arguments.op]:
        rows = measure(op, arguments)
        print(f"{op}: {rows[-1].get('problem', '')}, {arguments.dtype}, {passes}", flush=True)
        for row in rows:
            print(line(row), flush=True)
        table += rows
    write_json(arguments.json, table)
