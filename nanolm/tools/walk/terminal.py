"""The walk on a terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nanolm.tools.walk.stop import Stop
from nanolm.tools.walk.stops import LETTERS

INDENT = 4


def show(console: Console, title: str, walk: Sequence[Stop]) -> None:
    """Prints each stop: its name, what is seen there, its table, and where the code stands."""
    console.print(Text(title, style="bold"))
    console.print(Text(LETTERS))
    for number, stop in enumerate(walk, start=1):
        console.print(Text(f"\n{number:>2}  {stop.name}", style="bold"))
        console.print(Padding(Text(stop.says), (0, 0, 0, INDENT)))
        if stop.rows:
            console.print(Padding(table(stop), (0, 0, 0, INDENT)))
        for place in stop.places:
            console.print(Padding(Text(str(place), style="dim"), (0, 0, 0, INDENT)))


def table(stop: Stop) -> Table:
    """The stop's rows, numbers on the right."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in stop.columns:
        grid.add_column(column.title, justify="right" if column.number else "left", overflow="fold")
    for row in stop.rows:
        grid.add_row(*map(Text, row))
    return grid
