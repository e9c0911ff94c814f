"""Findings as they are printed: each new sentence at once, each repeated one by its count.

One fault shows in many checks. Of failures, and of refusals, with one sentence (figures aside) the
first is printed when it is found, and the others, by their names, when all is done. The name of the
check in progress stands on the last line of a terminal.
"""

from __future__ import annotations

import collections
import re
import sys
from collections.abc import Iterable, Sequence

from nanolm.tables import GAP
from nanolm.terminal import columns, say, table_width, wrapped
from nanolm.tools.kernel_check.conformance import Finding

VERDICT, NAME = 7, 34
"""Columns of a verdict and of a check's name; a sentence stands beside them if it has room."""
SHOWN = 4
"""Names of checks that a sentence is repeated for."""
ERASE = "\r\x1b[K"


class Status:
    """The last line of a terminal, which says what is in progress; nothing anywhere else."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.now = ""

    def __call__(self, name: str) -> None:
        """Says what has begun."""
        self.now = name
        if self.terminal:
            room = (columns() or table_width()) - 1
            print(f"{ERASE}{f'  … {name}'[:room]}", end="", flush=True)

    def clear(self) -> None:
        """Makes room for other lines."""
        if self.terminal:
            print(ERASE, end="", flush=True)


def shape(finding: Finding) -> tuple[str, str]:
    """What equal findings have in common: the verdict, and the sentence without its figures."""
    return finding.verdict, re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "0", finding.words)


def line(finding: Finding) -> str:
    """One finding: its sentence beside it where that has room, else below, in lines of the terminal
    or in one."""
    head = f"{' ' * GAP}{finding.verdict:<{VERDICT}}{' ' * GAP}{finding.check}"
    if not finding.words:
        return head
    beside = f"{head:<{2 * GAP + VERDICT + NAME}}{' ' * GAP}{finding.words}"
    if len(beside) <= table_width():
        return beside
    below = " " * (2 * GAP + VERDICT) + finding.words
    lines = [below] if columns() is None else wrapped(below, table_width())
    return "\n".join([head, *lines])


class Report:
    """Prints the findings about one kernel."""

    def __init__(self, op: str, name: str, status: Status) -> None:
        self.status = status
        self.found: list[Finding] = []
        status.clear()
        say(f"{op}: {name}")

    def add(self, finding: Finding) -> None:
        """Prints a finding, unless its sentence has been printed."""
        known = finding.verdict != "pass" and shape(finding) in map(shape, self.found)
        self.found.append(finding)
        self.status.clear()
        if not known:
            say(line(finding))

    def close(self) -> None:
        """Prints what was repeated, and the counts."""
        self.status.clear()
        for first, *others in grouped(f for f in self.found if f.verdict != "pass"):
            if others:
                say(line(Finding(of_these(first, others), first.verdict)))
        say(f"  {counts(self.found)}")
        if not any(finding.verdict in ("pass", "FAIL") for finding in self.found):
            say("  it passed no check: of a kernel that refuses everything nothing is known")


def grouped(found: Iterable[Finding]) -> list[list[Finding]]:
    """Findings that say the same together, in the order of their first ones."""
    groups: dict[tuple[str, str], list[Finding]] = collections.defaultdict(list)
    for finding in found:
        groups[shape(finding)].append(finding)
    return list(groups.values())


def of_these(first: Finding, others: Sequence[Finding]) -> str:
    """The checks that say what another one has said, by count and name."""
    names = ", ".join(finding.check for finding in others[:SHOWN])
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return f"{len(others)} more as {first.check}: {names}{more}"


def counts(found: Sequence[Finding]) -> str:
    """How many passed, failed, and were refused or noted."""
    number = collections.Counter(finding.verdict for finding in found)
    words = f"{number['pass']} passed, {number['FAIL']} failed, {number['refused']} refused"
    return f"{words}, {number['note']} noted" if number["note"] else words
