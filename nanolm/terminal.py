"""How wide the terminal is, and sentences that fit it.

A terminal has an end of its lines; so has what is printed while COLUMNS says so, as it does for
rich and argparse. A file and a pipe have none: there a sentence stays one line, which `grep` finds.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import TextIO

from rich.cells import cell_len

WIDEST = 80
"""Columns that a table takes at most, however many there are."""
LEAST = 20
"""Columns for which lines are laid out in a terminal that has fewer."""
HANGING = 4
"""By how much the second and later lines of a sentence stand further right."""


def columns(stream: TextIO | None = None) -> int | None:
    """How many characters a line of the stream (the standard output) has room for, at least LEAST,
    or None."""
    told = os.environ.get("COLUMNS", "")
    if (told.isdecimal() and int(told[:9]) > 0) or (stream or sys.stdout).isatty():
        return max(LEAST, shutil.get_terminal_size().columns)
    return None


def table_width() -> int:
    """How wide a table may be here."""
    return min(WIDEST, columns() or WIDEST)


def say(text: object, *, stream: TextIO | None = None) -> None:
    """Print a text at once; its lines are wrapped where the stream's have an end."""
    stream = stream or sys.stdout
    width = columns(stream)
    lines = str(text).split("\n")
    if width is not None:
        lines = [part for line in lines for part in wrapped(line, width)]
    print("\n".join(lines), file=stream, flush=True)


def wrapped(line: str, width: int) -> list[str]:
    """The line in lines of at most so many characters, or of one word that is longer.

    What two spaces separate belongs together, as `loss 6.2371` does among other figures; only what
    is wider than a line by itself is broken between its words.
    """
    if cell_len(line) <= width:
        return [line]
    figures = re.split(r"(?<=\S)  +(?=\S)", line)
    if len(figures) > 1 and max(map(cell_len, figures)) <= width - HANGING:
        return filled(figures, "  ", width)
    indent = len(line) - len(line.lstrip())
    words = line.split()
    return filled([" " * indent + words[0], *words[1:]], " ", width) if words else [""]


def filled(parts: list[str], gap: str, width: int) -> list[str]:
    """The parts, as many as a line has room for; lines after the first hang by the indent of the
    first and `HANGING`."""
    indent = len(parts[0]) - len(parts[0].lstrip()) + HANGING
    lines = [parts[0]]
    for part in parts[1:]:
        if cell_len(lines[-1] + gap + part) <= width:
            lines[-1] += gap + part
        else:
            lines.append(" " * indent + part)
    return lines
