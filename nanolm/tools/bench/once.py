"""One contestant of `nanolm bench train`, measured alone in this process, without a contest.

    python -m nanolm.tools.bench.once '{"settings": {"model": "nanolm", "objective": "clm"}, …}'

prints one line of JSON (see `measure`). A contest compares; this is for a look at one of them, on a
machine that nothing else works on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nanolm.errors import UserError, require
from nanolm.tools.bench.admission import why_not
from nanolm.tools.bench.clock import Clock, Step, clock_on
from nanolm.tools.bench.shape import Shape, step_flops
from nanolm.tools.bench.step import build_step
from nanolm.tools.trace import write_trace
from nanolm.training.throughput import peak_flops

TRACED = 2
"""Steps of a trace."""


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Builds the job's contestant, takes its warm-up steps and a turn, and says what it found.

    The job's keys are those of a contest's: `settings` {model, objective, compile, kernels},
    `precision`, `shape`, and, if the defaults will not do, `device` (auto), `threads` (as many as
    cores), `warmup` (8) and `steps` (20); with `trace`, two more steps are recorded into that file.
    Raises UserError for cuda where there is none, for a package that is not installed, and for a
    kernel that cannot serve.
    """
    begin = time.perf_counter()
    torch.set_num_threads(job.get("threads") or os.cpu_count() or 1)
    clock, shape = clock_on(job.get("device", "auto")), Shape(**job["shape"])
    reason = why_not(job, clock.device.type)
    require(reason is None, f"{job['settings']['model']}: {reason}")
    step = build_step(job, shape, clock.device)
    step.prepare(clock)
    losses = [clock.take(step)["loss"] for _ in range(job.get("warmup", 8))]
    clock.wait()
    ready = time.perf_counter() - begin
    waits = clock.count_waits(step)
    clock.forget_peak()
    turn = clock.turn(step, job.get("steps", 20))
    traced = record(clock, step, pathlib.Path(job["trace"])) if "trace" in job else {}
    return {
        **named(job, shape, clock),
        "parameters": step.n_parameters,
        "kernels": step.kernels,
        "ready_seconds": ready,
        **speeds(job, clock, shape, turn),
        "peak_bytes": turn["peak_bytes"],
        "reserved_bytes": turn.get("reserved_bytes"),
        "host_waits": waits,
        "phases": turn["phases"],
        "losses": [float(losses[0]), turn["loss"][-1]],
        **traced,
    }


def named(job: dict[str, Any], shape: Shape, clock: Clock) -> dict[str, Any]:
    """Who was measured, and on what."""
    settings = job["settings"]
    return {
        "contestant": settings["model"],
        "objective": settings["objective"],
        "compile": settings.get("compile", False),
        "precision": job["precision"],
        "shape": dataclasses.asdict(shape),
        "device": clock.name,
    }


def speeds(job: dict[str, Any], clock: Clock, shape: Shape, turn: dict[str, Any]) -> dict[str, Any]:
    """Times of a step in milliseconds, and the rates of the freely running ones."""
    seconds = statistics.mean(turn["seconds"])
    flops = step_flops(shape, job["settings"]["objective"]) / seconds
    peak, source = peak_flops(clock.device, job["precision"])
    return {
        "step_ms": 1e3 * statistics.median(turn.get("waited_seconds", turn["seconds"])),
        "free_step_ms": 1e3 * seconds,
        "tokens_per_second": shape.tokens / seconds,
        "model_tflops": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "peak_tflops": peak / 1e12 if peak else None,
        "peak_source": source,
    }


def record(clock: Clock, step: Step, path: pathlib.Path) -> dict[str, str]:
    """Writes a Chrome trace of two steps, to open in https://ui.perfetto.dev; `operators` is the
    table of those that took longest."""
    on_gpu = clock.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as profiler:
        for _ in range(TRACED):
            clock.take(step)
        clock.wait()
    write_trace(profiler, path)
    sort = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    return {"operators": averages.table(sort_by=sort, row_limit=25, max_name_column_width=60)}


def main() -> None:
    """Read the job, measure, print; whatever else is printed meanwhile goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        found = measure(json.loads(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
