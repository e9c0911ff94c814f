"""What became of a stage: the unit of the report, and of the README's lines that come from it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What became of a stage: ok, FAIL, left out or not begun; `device` and `day` say where and
    when, `lines` what it said, `figures` what it measured."""

    name: str
    part: int
    verdict: str
    words: str = ""
    seconds: float = 0.0
    device: str = ""
    day: str = ""
    lines: list[str] = dataclasses.field(default_factory=list)
    figures: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def text(self) -> list[str]:
        """The entry in report.txt."""
        time = f"{self.seconds:5.0f} s  " if self.seconds else " " * 9
        head = f"{self.verdict:<9}  {time}{self.name}{f': {self.words}' if self.words else ''}"
        return [head, *(f"             {line}" for line in self.lines)]
