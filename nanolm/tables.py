"""Tables that fit 80 columns, or a terminal that has fewer: one row a line, names left, numbers
right.

Columns that have no room begin another table below, with the names again; a name that is too long
loses its beginning, since runs differ in their ends.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from nanolm.terminal import columns, say, table_width

GAP = 2
SHORTEST = 20
"""What a name may always take, however many columns there are."""
NARROWEST = 24
"""Sentences beside words need this many columns, or they stand below."""


def open_console(*, highlight: bool = True) -> Console:
    """The standard output as rich prints to it, as wide as our own sentences and tables are.

    Left to itself, rich measures whichever stream it finds a terminal behind, in a pipe standard
    input's.
    """
    return Console(width=columns() or table_width(), highlight=highlight)


def show(*parts: RenderableType) -> None:
    """Print tables and sentences, one below the other."""
    for part in parts:
        if isinstance(part, str):
            say(part)
        else:
            open_console().print(part)


def tables(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    width: int | None = None,
) -> list[Table]:
    """The rows as tables of at most this width (`table_width` when None); the first `left` columns
    are words, the first of all names the row.

    A single column that is wider than the terminal is folded.
    """
    width = width or table_width()
    widths = [max(cell_len(line[i]) for line in (head, *rows)) + GAP for i in range(len(head))]
    name = max(SHORTEST, min(widths[0], width - sum(widths[1:])))
    name = min(name, widths[0])
    shown = [[ending(row[0], name - GAP), *row[1:]] for row in rows]
    return [
        table(sum(i < left for i in block), *([line[i] for i in block] for line in (head, *shown)))
        for block in blocks(widths, name, width)
    ]


def blocks(widths: Sequence[int], name: int, width: int) -> list[list[int]]:
    """Which columns stand in which table: the first in all, the others in order."""
    found, room = [[0]], width - name
    for column, needed in enumerate(widths[1:], start=1):
        if needed - GAP > room and len(found[-1]) > 1:
            found.append([0])
            room = width - name
        found[-1].append(column)
        room -= needed
    return found


def table(left: int, head: Sequence[str], *rows: Sequence[str]) -> Table:
    """One table without lines; the first `left` columns are words."""
    grid = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    for column, title in enumerate(head):
        justify: Literal["left", "right"] = "left" if column < left else "right"
        grid.add_column(Text(title), justify=justify, overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def cells_of(cells: Sequence[str], widths: Sequence[int], *, left: int = 1, gap: int = GAP) -> str:
    """One row of a table that is printed while it is made, so that the widths are given.

    Cells that a line has no room for stand below it, with nothing in the place of the name.
    """
    sides = [str.ljust] * left + [str.rjust] * (len(cells) - left)
    padded = [side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True)]
    room = [width + gap for width in widths]
    lines = blocks(room, room[0], table_width() + gap - GAP)
    names = [padded[0], *[" " * widths[0]] * (len(lines) - 1)]
    return "\n".join(
        (" " * gap).join([name, *(padded[i] for i in line[1:])]).rstrip()
        for name, line in zip(names, lines, strict=True)
    )


def beside(cells: Sequence[str], widths: Sequence[int], prose: str) -> str:
    """Words of these widths, and sentences in what remains of the columns beside them; below
    them where the words are wider than that, and where little remains."""
    words = " " * GAP + cells_of(cells, widths, left=len(cells)).rstrip()
    column = GAP + sum(widths) + GAP * len(cells)
    if table_width() - column < NARROWEST:
        column = 2 * GAP + widths[0] * (len(cells) > 1)
    lines = textwrap.wrap(prose, max(1, table_width() - column))
    if lines and len(words) <= column - GAP:
        words = words.ljust(column) + lines.pop(0)
    return f"\n{' ' * column}".join([words, *lines])


def ending(text: str, most: int) -> str:
    """The text, or as much of its end as there is room for."""
    if cell_len(text) <= most:
        return text
    while cell_len(text) >= most:
        text = text[1:]
    return f"…{text}"
