"""`nanolm kernels roofline`: the least that each kernel can cost on three GPUs, on paper."""

from __future__ import annotations

import dataclasses

from nanolm.commands.json_file import write_json
from nanolm.tables import show, tables
from nanolm.terminal import say
from nanolm.tools.kernel_check.roofline import GPUS, TYPICAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to write."""

    json: str | None = None
    """Also write the table here."""


def run(arguments: Arguments) -> None:
    """Print the table."""
    record, rows = [], []
    for name, cost in TYPICAL.items():
        bounds = {gpu: cost.seconds(gpu) for gpu in GPUS}
        cells = [f"{1e3 * seconds:.2f} {kind[0]}" for seconds, kind in bounds.values()]
        rows.append([name, figure(cost.flops / 1e9), figure(cost.bytes / 1e6), *cells])
        record.append({"name": name, "flops": cost.flops, "bytes": cost.bytes, "bounds": bounds})
    show(*tables(["op and shape", "GFLOP", "MB", *GPUS], rows))
    say("Under each GPU: the least milliseconds, bound by compute (c) or by memory (m).")
    say("The peaks are the data sheets'; no kernel of this project has been timed there.")
    write_json(arguments.json, record)


def figure(value: float) -> str:
    """A tenth where it matters."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
