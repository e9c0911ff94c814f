"""Types of numbers that say their range: `count: Count = 1`.

A range stands in a field's annotation, where its type does, so reading a config or a command line
checks both (`typed.py`), and `--help` shows both.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated


@dataclasses.dataclass(frozen=True)
class Within:
    """At least, at most, more than and less than; None bounds nothing."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def broken(self, value: float) -> str | None:
        """What the number should have been, for the first bound that it breaks."""
        if self.least is not None and value < self.least:
            return f"at least {self.least}"
        if self.above is not None and value <= self.above:
            return f"more than {self.above}"
        if self.most is not None and value > self.most:
            return f"at most {self.most}"
        if self.below is not None and value >= self.below:
            return f"less than {self.below}"
        return None

    def __repr__(self) -> str:
        """What a number must be, for --help."""
        bounds = {"at least": self.least, "more than": self.above, "at most": self.most}
        bounds["less than"] = self.below
        return ", ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)


WHOLE = Within(-(1 << 63), (1 << 63) - 1)
"""Every integer: what the libraries behind can hold."""

Count = Annotated[int, Within(1, 1 << 31)]
"""How many of something, of which there must be one."""
Amount = Annotated[int, Within(0, 1 << 31)]
"""How many of something, of which there may be none."""
Seed = Annotated[int, Within(0, (1 << 32) - 1)]
"""What numpy, torch and SentencePiece take as a seed."""
Size = Annotated[float, Within(0)]
"""What is not negative."""
Decay = Annotated[float, Within(0, below=1)]
"""A part of a whole that is never all of it: dropout, momentum, the decay of an average."""
Share = Annotated[float, Within(above=0, most=1)]
"""A part of a whole that is not nothing."""
Fraction = Annotated[float, Within(0, 1)]
"""A part of a whole, which may be nothing."""
