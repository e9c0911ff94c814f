"""Numbers in tables: one rule for what is read as one, in whichever column it stands.

A number is one of JSON or Parquet, or a text that a config file would have read as one (YAML 1.2's
core schema, section 10.3.2), with or without blanks around it: `-1`, `2.5`, ` 3e-4 `. Python's own
`float` and `int` read more (`1_000`, digits of other scripts) and cut (`int(1.5)` is 1): wrong, and
in silence.
"""

from __future__ import annotations

import decimal
import re
from typing import Any

LARGEST = 1e100
"""No score is larger: its square and the sum of many of them are still numbers."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def number(value: Any) -> float | None:
    """A number of at most LARGEST, also from text (CSV), or None; a truth value is none."""
    if isinstance(value, str):
        value = value if _NUMBER.fullmatch(value.strip(" \t\r\n")) else None
    if isinstance(value, bool) or not isinstance(value, (int, float, decimal.Decimal, str)):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer may be longer than any float
        return None
    return found if abs(found) <= LARGEST else None


def whole_number(value: Any) -> int | None:
    """A number that is a whole one, `1.0` too, as tools write it that keep a column as floats; or
    None."""
    found = number(value)
    return int(found) if found is not None and found.is_integer() else None
