"""`nanolm kernels compile`: registers, spills and shared memory on GPUs that need not be there.

Compiles every Triton kernel as it would be launched and compares the rows with
kernels/compile_matrix.json; exit status 1 when a row breaks its budget or got worse. It compiles
the kernels of this project alone: how a plug-in's are launched, for which sizes and with which
options, nothing tells it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from nanolm.commands.json_file import write_json
from nanolm.errors import UserError
from nanolm.tables import beside, cells_of
from nanolm.terminal import say
from nanolm.tools.kernel_check.builds import BUILDS
from nanolm.tools.kernel_check.matrix import (
    ARCHITECTURES,
    RECORD,
    builds_for,
    compile_elsewhere,
    faults,
    key,
    read_record,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to compile."""

    archs: list[str] = dataclasses.field(default_factory=lambda: list(ARCHITECTURES))
    """GPU architectures."""
    sample: bool = False
    """Only a few kernels."""
    only: str = ""
    """Only builds whose name contains this, such as bucket or grouped+documents."""
    write: bool = False
    """Put these rows into kernels/compile_matrix.json; without --only also drop other rows of
    these architectures."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Refused: this project's kernels alone are compiled."""
    json: str | None = None
    """Also write the rows here."""

    def __post_init__(self) -> None:
        if self.plugins:
            raise UserError(
                "plugins: kernels compile compiles this project's kernels alone; on a GPU, what "
                "Triton gives for a launch of yours has its n_regs and n_spills"
            )


COLUMNS = {
    "kernel": 21,
    "regs": 4,
    "spill": 5,
    "lane": 4,
    "KiB": 7,
    "products": 11,
    "per": 5,
    "fit": 3,
    "wide": 4,
    "s": 5,
}
"""The table's columns and their widths; a row is printed when its kernel is compiled."""
LEGEND = {
    "regs, spill": "registers of a thread, and how many are spilled to memory",
    "lane": "how many are spilled to lanes of other registers (AMD)",
    "KiB": "shared memory, of what the GPU has",
    "products": "instructions of the tensor cores; per: products issued for one needed",
    "fit": "programs that a multiprocessor holds at once",
    "wide, s": "loads of 128 bits, and CPU seconds of compiling",
}


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    cores = " ".join(f"{name}:{count}" for name, count in row["tensor_core"].items()) or "-"
    shared = f"{row['shared'] / 1024:.0f}/{row['shared_limit'] / 1024:.0f}"
    cells = (
        row["kernel"].removesuffix("_kernel"),
        str(row["registers"]),
        str(row["spills"]),
        str(row.get("scalar_spills") or 0),
        shared,
        cores,
        "-" if row["products"] is None else str(row["products"]),
        str(row["programs"]),
        str(row["wide_loads"]),
        f"{row['seconds']:.1f}",
    )
    return cells_of(cells, list(COLUMNS.values()), gap=1)


def regression(row: dict[str, Any], recorded: dict[str, Any] | None) -> str | None:
    """How a row is worse than the recorded one, or None."""
    if recorded is None:
        return "not in kernels/compile_matrix.json; add it with --write true"
    if row["spills"] > recorded["spills"]:
        return f"{row['spills']} spills, {recorded['spills']} recorded"
    if set(row["tensor_core"]) != set(recorded["tensor_core"]):
        return f"tensor cores {row['tensor_core']}, {recorded['tensor_core']} recorded"
    before = recorded.get("products")  # rows of before this column have none
    if before is not None and row["products"] > before:
        return f"{row['products']} products for one that is needed, {before} recorded"
    return None


def refuse_empty(arguments: Arguments) -> None:
    """Raises UserError where nothing would be compiled, which would read as a success."""
    sample, only = arguments.sample, arguments.only
    if not any(builds_for(arch, sample=sample, only=only) for arch in arguments.archs):
        words = sorted({part for b in BUILDS for part in (b.op, str(b.width), *b.features)})
        raise UserError(
            f"only: nothing to compile for {', '.join(arguments.archs)} has {only!r} in "
            f"its name{' and is in the sample' * sample}; names are such as "
            f"{BUILDS[0].name}, made of {', '.join(words)} (it compiles this project's kernels "
            f"alone, not a plug-in's)"
        )


def run(arguments: Arguments) -> None:
    """Compile, print, compare."""
    unknown = set(arguments.archs) - set(ARCHITECTURES)
    if unknown:
        raise UserError(
            f"archs: {', '.join(sorted(unknown))} unknown; choose from {', '.join(ARCHITECTURES)}"
        )
    refuse_empty(arguments)
    recorded = {key(row): row for row in read_record()}
    rows: list[dict[str, Any]] = []
    complaints: list[str] = []
    for name, words in LEGEND.items():
        print(beside([name], [max(map(len, LEGEND))], words))
    for row in compile_elsewhere(arguments.archs, sample=arguments.sample, only=arguments.only):
        if not rows or (row["arch"], row["build"]) != (rows[-1]["arch"], rows[-1]["build"]):
            say(f"{row['arch']} {row['build']}")
            print(cells_of(list(COLUMNS), list(COLUMNS.values()), gap=1))
        print(line(row), flush=True)
        rows.append(row)
        worse = None if arguments.write else regression(row, recorded.get(key(row)))
        complaints += [f"{key(row)}: {words}" for words in [*faults(row), worse] if words]
    if arguments.write:
        partial = arguments.sample or arguments.only
        dropped = () if partial else arguments.archs
        merged = {k: row for k, row in recorded.items() if row["arch"] not in dropped}
        merged |= {key(row): row for row in rows}
        write_rows(RECORD, [merged[k] for k in sorted(merged)])
    write_json(arguments.json, rows)
    say(f"{len(rows)} kernels compiled, {len(complaints)} complaints")
    for words in complaints:
        say(f"  {words}")
    if complaints:
        raise SystemExit(1)


def write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """One row a line, so that a diff reads well."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
