"""`nanolm kernels roofline`: the least that each kernel can cost on three GPUs, on paper."""

from __future__ import annotations

import dataclasses

from nanolm.commands.json_file import write_json
from nanolm.tools.kernel_check.roofline import GPUS, TYPICAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to write."""

    json: str | None = None
    """Also write the table here."""


def run(arguments: Arguments) -> None:
    """Print the table."""
    table = []
    for name, cost in TYPICAL.items():
        bounds = {gpu: cost.seconds(gpu) for gpu in GPUS}
        words = "  ".join(f"{g} {1e3 * s:8.3f} ms ({kind})" for g, (s, kind) in bounds.items())
        print(f"{name:<48} {cost.flops / 1e9:9.1f} GFLOP {cost.bytes / 1e6:9.1f} MB  {words}")
        table.append({"name": name, "flops": cost.flops, "bytes": cost.bytes, "bounds": bounds})
    print("Bounds from data-sheet peaks; no kernel of this project has been timed on these GPUs.")
    write_json(arguments.json, table)
