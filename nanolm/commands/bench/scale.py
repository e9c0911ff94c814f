"""`nanolm bench scale`: how step time grows with the number of processes, strong and weak.

    strong   the global batch stays; N processes should take 1/N of the time
             efficiency(N) = t(1) / (N t(N))
    weak     each process keeps its rows; the time should stay
             efficiency(N) = t(1) / t(N)

Each measurement is a fresh torchrun of N processes with the same number of threads each, taken in
turns (1, 2, 1, 2, …), so that whatever else the machine does meets all; turns in which the host
took its cores away are taken again, as in nanolm/tools/bench/contest.py. The table shows medians
over turns, with where the step's time goes: waiting for data, forward, backward, communication and
optimizer. Finished measurements are kept in `results`, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import sys
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from nanolm.commands.figures import write_json
from nanolm.config.ranges import Amount, Count
from nanolm.distributed.devices import DeviceWord, device_type
from nanolm.errors import require
from nanolm.tables import tables
from nanolm.tools.bench.cells import Cells, cpu_name, run_process
from nanolm.tools.bench.contest import Theft, enough, quiet, quietest
from nanolm.tools.bench.shape import Shape
from nanolm.training.phases import PHASES

MODULE = "nanolm.tools.bench.ranks"
"""Starts the ranks of one measurement."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Shape):
    """Measure the training step with several numbers of processes on this machine."""

    processes: list[Count] = dataclasses.field(default_factory=lambda: [1, 2])
    """Numbers of processes; the first is what the others are compared with."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How the processes share the work."""
    objective: Literal["clm", "mlm"] = "clm"
    """Which step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """In which arithmetic."""
    device: DeviceWord = "auto"
    """auto takes CUDA when there is any."""
    threads: Count = 1
    """CPU threads of each process."""
    rounds: Count = 5
    """Turns of every number of processes."""
    steps: Count = 5
    """Measured steps in each turn."""
    warmup: Amount = 2
    """Steps before them."""
    batch: Count = 16
    """Rows of a step: of all processes (strong), of each (weak)."""
    results: str = "runs/bench_scale.json"
    """Where finished measurements are kept, and found by the next call."""
    fresh: bool = False
    """Measure everything anew: throw away what `results` holds."""
    json: str | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        require(bool(self.processes), "processes is empty; name at least one number")


def job_of(arguments: Arguments, scaling: str, processes: int) -> dict[str, Any]:
    """All that decides one measurement."""
    names = [field.name for field in dataclasses.fields(Shape)]
    shape = {name: getattr(arguments, name) for name in names}
    shape["batch"] *= processes if scaling == "weak" else 1
    kept = ("strategy", "objective", "precision", "device")
    settings = {key: getattr(arguments, key) for key in kept} | {"processes": processes}
    common = {key: getattr(arguments, key) for key in ("threads", "steps", "warmup")}
    return {"settings": settings, "shape": shape, **common}


def measure(arguments: Arguments, scaling: str, cells: Cells) -> list[dict[str, Any]]:
    """A row for each number of processes."""
    jobs = {count: job_of(arguments, scaling, count) for count in arguments.processes}
    device = device_type(arguments.device)
    turns: list[dict[int, dict[str, Any]]] = []
    shares: list[float] = []
    while not enough(shares, arguments.rounds):
        what = {"turn": len(turns) + 1}
        taken = {
            count: cells.get({"job": job, **what}, functools.partial(take, job), device)
            for count, job in jobs.items()
        }
        turns.append(taken)
        shares.append(max(result["stolen"] for result in taken.values()))
        print(f"{scaling}: turn {len(turns)}, {shares[-1]:.0%} stolen", file=sys.stderr)
    kept = quietest(shares, arguments.rounds)
    print(f"{scaling}: {quiet([shares[n] for n in kept])}")
    return rows(arguments, scaling, {count: [turns[n][count] for n in kept] for count in jobs})


def take(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement, and the share of the machine's time that was stolen meanwhile."""
    theft = Theft()
    return run_process(job, MODULE) | {"stolen": theft.share()}


def rows(
    arguments: Arguments, scaling: str, found: dict[int, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Medians over turns, and each number of processes against the first."""
    table: list[dict[str, Any]] = []
    for count, results in found.items():
        turns = [statistics.median(result["seconds"]) for result in results]
        seconds = statistics.median(turns)
        tokens = job_of(arguments, scaling, count)["shape"]["batch"] * arguments.row_length
        rate = tokens / seconds
        first = table[0] if table else {"processes": count, "tokens_per_second": rate}
        speed = rate / first["tokens_per_second"]
        table.append(
            {
                "scaling": scaling,
                "processes": count,
                "step_seconds": seconds,
                "tokens_per_second": rate,
                "speed": speed,
                "efficiency": speed * first["processes"] / count,
                "phases": {
                    phase: statistics.median(result["phases"][phase] for result in results)
                    for phase in PHASES
                },
                "turn_seconds": turns,
                "load_average": statistics.median(r["load_average"] for r in results),
            }
        )
    return table


def tables_of(found: list[dict[str, Any]]) -> list[Table]:
    """What the terminal shows."""
    head = ("scaling", "tok/s", "speed", "efficiency", "step ms", *(f"{p} ms" for p in PHASES))
    rows = [
        [
            f"{row['scaling']}, {row['processes']}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed']:.2f}x",
            f"{row['efficiency']:.0%}",
            f"{1e3 * row['step_seconds']:.1f}",
            *(f"{1e3 * row['phases'][phase]:.1f}" for phase in PHASES),
        ]
        for row in found
    ]
    return tables(head, rows)


def run(arguments: Arguments) -> None:
    """Measure, print the table, write the figures."""
    cells = Cells(arguments.results, arguments.fresh)
    found = [row for scaling in ("strong", "weak") for row in measure(arguments, scaling, cells)]
    run_of = f"{arguments.strategy}, {arguments.objective} {arguments.precision}"
    print(f"{run_of}: scaling, with the number of processes")
    for table in tables_of(found):
        Console().print(table)
    cores = os.cpu_count() or 1
    if max(arguments.processes) * arguments.threads > cores:
        print(f"more threads than this machine's {cores} cores: no efficiency to speak of")
    machine = {"cpu": cpu_name(), "cores": cores}
    write_json(arguments.json, {**dataclasses.asdict(arguments), **machine, "rows": found})
