"""What the measurements share: how one is entered and left, and figures that are written as they
come, a line of JSON each, so that a process that is killed at its time limit leaves what it has."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from nanolm.config.load import parse
from nanolm.errors import UserError

LEFT_OUT = 3
"""Exit status of a measurement that cannot be made here and has said why."""


def enter(schema: type, run: Callable[[Any], int], prog: str) -> None:
    """Runs a measurement on this process's command line and leaves with the status it returns: 0
    when all was well, 1 when something is wrong, LEFT_OUT; 2 for a mistake of the user's."""
    try:
        status = run(parse(schema, sys.argv[1:], prog=prog))
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    raise SystemExit(status)


class Figures:
    """Appends rows to a file; keeps nothing when there is no path."""

    def __init__(self, path: str | None) -> None:
        self.path = None if path is None else pathlib.Path(path)
        if self.path is not None:
            self.path.write_text("", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Writes one row."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_figures(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows that a file holds; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the writer was killed in it
            break
    return rows
