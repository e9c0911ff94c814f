"""`nanolm kernels list`: every registered kernel, and whether it can serve here, or why not."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count
from nanolm.ops.contract import AUTO, candidates, choose
from nanolm.registry import OPS, SIZED
from nanolm.tables import beside
from nanolm.terminal import say
from nanolm.tools.kernel_check.examination import silent
from nanolm.tools.kernel_check.survey import typical


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to list."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device type that the kernels are asked about."""
    head_dim: Count = 64
    """Width of a head."""
    causal: bool = True
    """Whether attention is causal."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Modules with kernels of your own."""
    json: str | None = None
    """Also write the table here."""


def rows(arguments: Arguments) -> list[dict[str, str]]:
    """One row per kernel: op, name, what it is, and its status here."""
    table = []
    for op in OPS:
        spec = typical(op, arguments.device, head_dim=arguments.head_dim, causal=arguments.causal)
        chosen = choose(op, spec).kernel.name
        for name, kernel in candidates(op).items():
            reason = kernel.why_not(spec)
            if name == chosen:
                status = "auto takes it"
            else:
                status = f"no: {reason}" if reason else f"can serve, {when(op, name)}"
            words = (type(kernel).__doc__ or "").strip().splitlines()
            table.append(
                {"op": op, "kernel": name, "status": status, "what": words[0] if words else ""}
            )
    return table


def when(op: str, name: str) -> str:
    """When a kernel that can serve does, though `auto` takes another one without timings."""
    by_time = op in SIZED and name in AUTO[op]
    return "when named or timed to be faster" if by_time else "when named"


def run(arguments: Arguments) -> None:
    """Print the kernels of each op, with what they are and whether they serve."""
    for sentence in silent(arguments.plugins):
        say(sentence)
    table = rows(arguments)
    for op in dict.fromkeys(row["op"] for row in table):
        found = [row for row in table if row["op"] == op]
        print(op)
        width = max(len(row["kernel"]) for row in found)
        for row in found:
            print(beside([row["kernel"]], [width], f"{row['status']}. {row['what']}"))
    write_json(arguments.json, table)
