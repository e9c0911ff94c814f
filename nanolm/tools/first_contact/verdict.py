"""A verdict on one row of the tables of evidence, and its line there."""

from __future__ import annotations

import dataclasses
import datetime


def today() -> str:
    """The date as 2026-01-31."""
    return datetime.date.today().isoformat()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One check: which command stands for it, whether it passed, what was seen, and when."""

    name: str
    command: str
    passed: bool
    words: str
    day: str = dataclasses.field(default_factory=today)

    def line(self, device: str) -> str:
        """The line for the column *on a GPU*."""
        mark = "passed" if self.passed else "FAILED"
        return f"| {self.name} | `{self.command}` | {mark}, {device}, {self.day}: {self.words} |"
