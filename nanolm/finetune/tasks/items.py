"""What a record becomes before it is batched: items, which hold framed sequences of token ids.

Shapes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from nanolm.data.tables.files import Record


@dataclasses.dataclass(slots=True)
class Sequence:
    """Token ids [T] of one framed sequence, where its second segment begins (T when none), whether
    what the second shares with the first is marked, and how many tokens at the end are a third."""

    tokens: np.ndarray
    second: int
    mark_shared: bool = False
    apart: int = 0

    def segments(self, special_V: np.ndarray) -> np.ndarray:
        """int64[T]: 0 in the first segment, 1 in the second, where with `mark_shared` the tokens
        that the first has too are marked by its 0; never a special one (`special_V`: bool[V])."""
        segments_T = (np.arange(len(self.tokens)) >= self.second).astype(np.int64)
        if self.mark_shared:
            shared_T = np.isin(self.tokens, self.tokens[: self.second])
            segments_T[shared_T & ~special_V[self.tokens]] = 0
        segments_T[len(segments_T) - self.apart :] = 2
        return segments_T


@dataclasses.dataclass(slots=True)
class Item:
    """What one training row is: the sequences of a record (or of a window of it) and the target.

    `record` is the record's index in its table, `cut` the number of tokens that did not fit.
    """

    record: int
    sequences: list[Sequence]
    target: Any
    cut: int = 0
    extra: Any = None


def text_problem(record: Record, fields: tuple[str, ...]) -> str | None:
    """Why one of these fields is no usable text, or None."""
    return next(filter(None, (problem_of(field, record.get(field)) for field in fields)), None)


def texts_problem(field: str, values: Iterable[Any]) -> str | None:
    """Which of a field's values is no usable text and why, or None."""
    named = (problem_of(f"{field}[{i}]", value) for i, value in enumerate(values))
    return next(filter(None, named), None)


def problem_of(name: str, value: Any) -> str | None:
    """Why a value is no usable text, or None."""
    if not isinstance(value, str):
        return f"{name} is {value!r}, not text"
    return None if value.strip() else f"{name} is empty"
