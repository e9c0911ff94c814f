"""Label sets: inferred from the training records, ordered the same way everywhere.

Integers are ordered by value, everything else as text, so the set depends neither on the order of
the file nor on the machine. It is written into the run's config and thereby stored with the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from nanolm.errors import UserError

_WHOLE = re.compile(r"-?\d{1,300}")
"""Python reads no integer of some thousand digits."""


def label_text(value: Any) -> str:
    """A label as text: true -> "true", 1 -> "1", 1.0 -> "1"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def label_problem(value: Any) -> str | None:
    """Why a value is no label, or None: nothing, an empty cell, no number, or several values."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "is missing"
    if isinstance(value, str) and not value.strip():
        return "is empty"
    if isinstance(value, (list, tuple, dict)):
        return f"is {value!r}, not a single value"
    return None


def infer_labels(values: Iterable[Any], what: str) -> list[str]:
    """The distinct labels in order; raises UserError when there are fewer than two."""
    found = {label_text(value) for value in values}
    if len(found) < 2:
        raise UserError(
            f"{what} has {len(found)} different labels; at least two are needed to learn from"
        )
    return ordered(found)


def ordered(labels: Iterable[str]) -> list[str]:
    """Labels in their order: by value when all are integers, else as text."""
    labels = list(labels)
    if all(_WHOLE.fullmatch(label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))  # 1 and 01 are two labels
    return sorted(labels)


def tag_labels(values: Iterable[Any], what: str) -> list[str]:
    """Tags with O first; every entity type gets all the prefixes (B, I, …) that the set uses."""
    found = set(infer_labels(values, what))
    prefixes = {tag[0] for tag in found if tag[1:2] == "-"}
    if prefixes and prefixes <= set("BIESLUMW") and all(t == "O" or t[1:2] == "-" for t in found):
        types = {tag[2:] for tag in found if tag != "O"}
        found |= {f"{prefix}-{kind}" for prefix in prefixes for kind in types}
        return sorted(found, key=lambda tag: (tag != "O", tag[2:], tag))
    return ordered(found)


def class_weights(values: Iterable[Any], labels: list[str]) -> list[float]:
    """Balanced weights, inversely proportional to frequency, whose mean over the rows is 1."""
    counts = dict.fromkeys(labels, 0)
    total = 0
    for value in values:
        counts[label_text(value)] += 1
        total += 1
    present = sum(1 for count in counts.values() if count)
    return [round(total / (present * c), 6) if c else 0.0 for c in counts.values()]
