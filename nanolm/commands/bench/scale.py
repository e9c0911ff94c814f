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
import os
from typing import Any, Literal

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Amount, Count
from nanolm.distributed.devices import DeviceWord
from nanolm.errors import require
from nanolm.tables import show
from nanolm.terminal import say
from nanolm.tools.bench.cells import Cells, cpu_name
from nanolm.tools.bench.scaling import measure, tables_of
from nanolm.tools.bench.shape import Shape


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

    @property
    def job(self) -> dict[str, Any]:
        """All that the measurements have in common."""
        shape = {field.name: getattr(self, field.name) for field in dataclasses.fields(Shape)}
        kept = ("strategy", "objective", "precision", "device")
        settings = {key: getattr(self, key) for key in kept}
        common = {key: getattr(self, key) for key in ("threads", "steps", "warmup")}
        return {"settings": settings, "shape": shape, **common}


def run(arguments: Arguments) -> None:
    """Measure, print the table, write the figures."""
    cells = Cells(arguments.results, arguments.fresh)
    found = [
        row
        for scaling in ("strong", "weak")
        for row in measure(arguments.job, scaling, arguments.processes, arguments.rounds, cells)
    ]
    run_of = f"{arguments.strategy}, {arguments.objective} {arguments.precision}"
    say(f"{run_of}: scaling, with the number of processes")
    show(*tables_of(found))
    cores = os.cpu_count() or 1
    if max(arguments.processes) * arguments.threads > cores:
        say(f"more threads than this machine's {cores} cores: no efficiency to speak of")
    machine = {"cpu": cpu_name(), "cores": cores}
    write_json(arguments.json, {**dataclasses.asdict(arguments), **machine, "rows": found})
