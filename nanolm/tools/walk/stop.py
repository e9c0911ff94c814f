"""A stop of the walk, and how text and tokens are written in its sentences and tables."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable
from typing import Any

from nanolm.data.tokenizer import Tokenizer
from nanolm.tools.walk.place import Place

SHOWN = 24
"""Pieces and ids of the row that are shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    title: str
    number: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """One stop: what is seen there, in words, rows and figures, and who did it."""

    name: str
    says: str
    places: tuple[Place, ...]
    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def printable(text: str) -> str:
    """The text on one line: what cannot be seen is written as Python would."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def spaced(text: str) -> str:
    """The text on one line; spaces side by side are ▁, since the end of a line swallows them."""
    return re.sub(" {2,}", lambda run: "▁" * len(run[0]), printable(text))


def shortened(text: str, most: int) -> str:
    """The text's beginning."""
    return text if len(text) <= most else text[: most - 1] + "…"


def beginning(words: Iterable[str]) -> str:
    """The first words, side by side."""
    first = list(itertools.islice(words, SHOWN + 1))
    return " ".join(first[:SHOWN] + ["…"] * (len(first) > SHOWN))


def shown(tokenizer: Tokenizer, index: int) -> str:
    """A token in a sentence."""
    return f"{printable(tokenizer.piece(index))!r} ({index})"
