"""Which lines of the kernels run, and in what order, also inside Triton's interpreter.

The interpreter compiles each kernel again from its syntax tree, with the file's name and line
numbers, so Python's own trace sees it; packages for coverage do not look there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tests.kernel_tools.mutation import FILES, ROOT

Arc = tuple[str, int, int]
"""A file, a line of it, and the one that ran next in the same call; 0 for none: it returned."""

NAMES = {str(ROOT / file): file for file in FILES}


@contextlib.contextmanager
def traced() -> Iterator[set[Arc]]:
    """The arcs that this thread goes along within it."""
    arcs: set[Arc] = set()

    def enter(frame: Any, event: str, _: Any) -> Any:
        file = NAMES.get(frame.f_code.co_filename)
        if file is None:
            return None
        last = 0

        def step(frame: Any, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                arcs.add((file, last, frame.f_lineno))
                last = frame.f_lineno
            elif event == "return":
                arcs.add((file, last, 0))
            return step

        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield arcs
    finally:
        sys.settrace(before)


def lines_of(arcs: set[Arc]) -> set[tuple[str, int]]:
    """(file, line) of all that ran."""
    return {(file, line) for file, _, line in arcs if line}
