"""`nanolm runs`: all runs below a folder as a table."""

from __future__ import annotations

import dataclasses
import pathlib

from rich.console import Console

from nanolm.commands.json_file import write_json
from nanolm.errors import UserError
from nanolm.tables import open_console, tables
from nanolm.terminal import say
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
        "trunk": run.setting("model", "trunk"),
        "objective": run.setting("objective", "name"),
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
        say(f"note: {problem}")
    rows = [row(each) for each in runs]
    show(open_console(), rows, arguments.folder)
    write_json(arguments.json, rows)


HEAD = ("run", "objective", "step", "train", "val", "bits/B", "tok/s")


def show(console: Console, rows: list[dict], folder: str) -> None:
    """The table, a line a run, and what its headings mean."""
    lines = [
        [
            name_below(folder, figures["run"]),
            str(figures["objective"] or "-"),
            f"{figures['steps']}{'' if figures['finished'] else '…'}",
            *(shown(figures[key], ".3f") for key in ("train_loss", "val_loss", "bits_per_byte")),
            shown(figures["tokens_per_second"], ",.0f"),
        ]
        for figures in rows
    ]
    for table in tables(HEAD, lines, left=2):
        console.print(table)
    console.print(
        "train, val: loss in nats; bits/B: bits a byte on val; …: not finished", highlight=False
    )


def name_below(folder: str, run: str) -> str:
    """The run's path from the folder that is listed, or its own name when it is that folder."""
    below = pathlib.Path(run).relative_to(folder).as_posix()
    return pathlib.Path(run).resolve().name if below == "." else below


def shown(value: float | None, form: str) -> str:
    """A figure as the table shows it."""
    return "-" if value is None else format(value, form)
