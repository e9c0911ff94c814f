"""`nanolm kernels compile`: registers, spills and shared memory on GPUs that need not be there.

Compiles every Triton kernel as it would be launched and compares the rows with
kernels/compile_matrix.json; exit status 1 when a row breaks its budget or got worse.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import nanolm.kernels
from nanolm.commands.json_file import write_json
from nanolm.errors import UserError
from nanolm.tools.kernel_check.matrix import ARCHITECTURES, compile_elsewhere, faults, key

RECORD = pathlib.Path(next(iter(nanolm.kernels.__path__))) / "compile_matrix.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to compile."""

    archs: list[str] = dataclasses.field(default_factory=lambda: list(ARCHITECTURES))
    """GPU architectures."""
    sample: bool = False
    """Only a few kernels."""
    only: str = ""
    """Only builds whose name contains this, such as bucket or tf32x3."""
    write: bool = False
    """Put these rows into kernels/compile_matrix.json; without --only also drop other rows of
    these architectures."""
    json: str | None = None
    """Also write the rows here."""


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    lanes = f" ({row['scalar_spills']} to lanes)" if row.get("scalar_spills") else ""
    cores = " ".join(f"{name}:{count}" for name, count in row["tensor_core"].items()) or "-"
    products = "" if row["products"] is None else f"({row['products']} of what is needed)"
    return (
        f"{row['arch']:<7} {row['build']:<34} {row['kernel']:<30} {row['registers']:>4} registers "
        f"{row['spills']:>4} spills{lanes} {row['shared']:>7}/{row['shared_limit']} B shared  "
        f"{cores} {products} {row['programs']} programs  {row['wide_loads']} wide loads  "
        f"{row['seconds']} s"
    )


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


def run(arguments: Arguments) -> None:
    """Compile, print, compare."""
    unknown = set(arguments.archs) - set(ARCHITECTURES)
    if unknown:
        raise UserError(
            f"archs: {', '.join(sorted(unknown))} unknown; choose from {', '.join(ARCHITECTURES)}"
        )
    recorded = {}
    if RECORD.exists():
        recorded = {key(row): row for row in json.loads(RECORD.read_text(encoding="utf-8"))}
    rows, complaints = [], []
    for row in compile_elsewhere(arguments.archs, sample=arguments.sample, only=arguments.only):
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
    print(f"{len(rows)} kernels compiled, {len(complaints)} complaints")
    for words in complaints:
        print(f"  {words}")
    if complaints:
        raise SystemExit(1)


def write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """One row a line, so that a diff reads well."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
