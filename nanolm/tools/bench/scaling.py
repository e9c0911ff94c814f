"""The measurements of `nanolm bench scale`: numbers of processes in turns, and their efficiency."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from nanolm.distributed.devices import device_type
from nanolm.tables import tables
from nanolm.terminal import say
from nanolm.tools.bench.cells import Cells, run_process
from nanolm.tools.bench.contest import Theft, enough, quiet, quietest
from nanolm.training.phases import PHASES

MODULE = "nanolm.tools.bench.ranks"
"""Starts the ranks of one measurement."""

Job = dict[str, Any]
Row = dict[str, Any]


def job_of(common: Job, scaling: str, processes: int) -> Job:
    """All that decides one measurement."""
    shape, settings = common["shape"], common["settings"] | {"processes": processes}
    rows = shape["batch"] * (processes if scaling == "weak" else 1)
    return common | {"settings": settings, "shape": shape | {"batch": rows}}


def measure(
    common: Job, scaling: str, processes: Sequence[int], rounds: int, cells: Cells
) -> list[Row]:
    """A row for each number of processes; `common` is what their jobs have in common."""
    jobs = {count: job_of(common, scaling, count) for count in processes}
    device = device_type(common["settings"]["device"])
    turns: list[dict[int, Row]] = []
    shares: list[float] = []
    while not enough(shares, rounds):
        what = {"turn": len(turns) + 1}
        taken = {
            count: cells.get({"job": job, **what}, functools.partial(take, job), device)
            for count, job in jobs.items()
        }
        turns.append(taken)
        shares.append(max(result["stolen"] for result in taken.values()))
        print(f"{scaling}: turn {len(turns)}, {shares[-1]:.0%} stolen", file=sys.stderr)
    kept = quietest(shares, rounds)
    say(f"{scaling}: {quiet([shares[n] for n in kept])}")
    return rows(scaling, {count: (jobs[count], [turns[n][count] for n in kept]) for count in jobs})


def take(job: Job) -> Row:
    """One measurement, and the share of the machine's time that was stolen meanwhile."""
    theft = Theft()
    return run_process(job, MODULE) | {"stolen": theft.share()}


def rows(scaling: str, found: dict[int, tuple[Job, list[Row]]]) -> list[Row]:
    """Medians over turns, and each number of processes against the first."""
    table: list[Row] = []
    for count, (job, results) in found.items():
        turns = [statistics.median(result["seconds"]) for result in results]
        seconds = statistics.median(turns)
        rate = job["shape"]["batch"] * job["shape"]["row_length"] / seconds
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


def tables_of(found: list[Row]) -> list[Table]:
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
