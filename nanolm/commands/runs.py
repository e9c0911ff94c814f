"""`nanolm runs`: all runs below a folder as a table."""

from __future__ import annotations

import dataclasses
import pathlib

from rich.console import Console
from rich.table import Column, Table

from nanolm.commands.figures import write_json
from nanolm.errors import UserError
from nanolm.training.runs import Run, read_run

POSITIONAL = ("folder",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """List runs."""

    folder: str = "runs"
    """Folder to look below."""
    json: str | None = None
    """Also write the table to this file."""


def row(run: Run) -> dict:
    """One run's figures."""
    steps = [line["step"] for line in run.lines if "step" in line]
    return {
        "run": str(run.folder),
        "trunk": run.config.get("model", {}).get("trunk"),
        "objective": run.config.get("objective", {}).get("name"),
        "steps": max(steps, default=0),
        "train_loss": run.last("train", "loss"),
        "val_loss": run.last("val", "loss"),
        "bits_per_byte": run.last("val", "bits_per_byte"),
        "tokens_per_second": run.last("train", "tokens_per_second"),
        "finished": bool(run.summary),
    }


def run(arguments: Arguments) -> None:
    """Print the table."""
    found = sorted(path.parent for path in pathlib.Path(arguments.folder).rglob("metrics.jsonl"))
    if not found:
        raise UserError(f"no runs below {arguments.folder}; name their folder with --folder")
    runs = [read_run(folder) for folder in found]
    for problem in [problem for each in runs for problem in each.problems]:
        print(f"note: {problem}")
    rows = [row(each) for each in runs]
    table = Table(*(Column(name, overflow="fold") for name in rows[0]))
    for figures in rows:
        table.add_row(*(cell(value) for value in figures.values()))
    Console().print(table)
    write_json(arguments.json, rows)


def cell(value: object) -> str:
    """A value as the table shows it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)
