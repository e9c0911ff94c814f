"""The other ops by device time, in all their passes, all kernels that serve: GPT-2's sizes, bf16.

python -m nanolm.tools.first_contact.op_speed [--device cpu] [--json FILE]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from nanolm.ops.contract import candidates
from nanolm.terminal import say
from nanolm.tools.bench.kernels import call as call_kernel
from nanolm.tools.bench.kernels import peak_bytes
from nanolm.tools.first_contact.device_time import milliseconds
from nanolm.tools.first_contact.measurement import Figures, enter
from nanolm.tools.kernel_check.problems import PROBLEMS, Sizes

GPT2 = {"batch": 16, "length": 1024, "heads": 12, "kv_heads": 12, "head_dim": 64}
GPT2 |= {"width": 768, "ff_width": 3072, "vocab_size": 50_304}
TINY = {"batch": 2, "length": 64, "heads": 4, "kv_heads": 4, "head_dim": 32}
TINY |= {"width": 128, "ff_width": 256, "vocab_size": 512}
OPS = ("linear_cross_entropy", "norm", "glu", "rotary", "linear", "symmetric_product")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where."""

    device: str = "cuda"
    """Device type; on a CPU the problems are tiny."""
    repetitions: int = 50
    """Calls that are timed."""
    json: str | None = None
    """Also write a line of JSON for each row to this file."""


def measure(op: str, arguments: Arguments) -> Iterator[dict[str, Any]]:
    """A row for each kernel of the op that serves."""
    on_cuda = arguments.device == "cuda"
    shape: dict[str, Any] = GPT2 if on_cuda else TINY
    sizes = Sizes(**shape, dtype="bfloat16", device=arguments.device)
    problem = PROBLEMS[op](sizes)
    for name, kernel in candidates(op).items():
        by_name = arguments.device in getattr(kernel, "only_by_name_on", ())
        if by_name or kernel.why_not(problem.spec) is not None:
            continue

        def call(kernel: Any = kernel) -> list[torch.Tensor]:
            return call_kernel(problem, kernel, sizes)

        row: dict[str, Any] = {"op": op, "kernel": name, "problem": problem.words}
        try:
            peak = peak_bytes(call, arguments.device)
            results = call()
            moved = problem.n_bytes(results)
            del results
            ms = milliseconds(call, arguments.device, arguments.repetitions)
            row |= {"ms": ms, "gb_per_s": moved / ms / 1e6, "peak_mb": peak / 1e6}
            row["tflops"] = problem.flops and problem.flops / ms / 1e9
        except Exception as error:  # noqa: BLE001  (one kernel's failure is its row)
            row["raises"] = f"{type(error).__name__}: {str(error)[:200]}"
        yield row
        if on_cuda:
            torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    if "raises" in row:
        return f"  {row['kernel']:<14} cannot: {row['raises']}"
    tflops = "" if row["tflops"] is None else f"{row['tflops']:9.3f} TFLOP/s"
    return (
        f"  {row['kernel']:<14} {row['ms']:9.2f} ms {tflops:>17} {row['gb_per_s']:9.2f} GB/s "
        f"{row['peak_mb']:9.1f} MB"
    )


def run(arguments: Arguments) -> int:
    """Measures, prints and writes; 1 when a kernel raised."""
    figures, good = Figures(arguments.json), True
    for op in OPS:
        say(op)
        for row in measure(op, arguments):
            figures.add(row)
            say(line(row))
            good &= "raises" not in row
    return int(not good)


if __name__ == "__main__":
    enter(Arguments, run, "op_speed")
