"""An attention problem cut down to what a kernel serves.

Most problems combine features, and a kernel that refuses one of them would not be asked about the
others together: one of causal, padded and packed rows alone never about padding beside documents.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection
from typing import Any

from nanolm.tools.kernel_check.attention_cases import Case
from nanolm.tools.kernel_check.attention_corners import UNUSUAL

SHAPES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "groups of heads": lambda case: {"n_kv_heads": case.n_heads},
    "keys of their own": lambda case: {"n_queries": case.n_keys},
}
"""Shapes that a problem may be asked without, and the fields instead."""
GIVEN_UP: dict[str, dict[str, Any]] = {
    "a bias": {"bias": "none", "bias_dtype": None},
    "a soft-cap": {"softcap": None},
    "a window": {"window": None},
    "an order": {"order": "none"},
    "a prefix": {"prefix": False},
    "documents": {"documents": False},
    "lengths": {"lengths": False},
    "causality": {"causal": False},
}
"""Features that a problem may be asked without, the first given up before the others, and the
fields that are then plain."""


def without(case: Case, names: Collection[str]) -> Case:
    """The case without these features."""
    plain: dict[str, Any] = {}
    for name in names:
        plain |= SHAPES[name](case) if name in SHAPES else GIVEN_UP[name]
    return dataclasses.replace(case, **plain)


def present(case: Case) -> list[str]:
    """What the case may be asked without. Where unusual numbers are its point, not without them."""
    point = UNUSUAL[case.numbers](1, 1)[0] if case.numbers in UNUSUAL else ""
    kept = {"documents": "documents", "order": "an order"}.get(point)
    return [name for name in (*SHAPES, *GIVEN_UP) if name != kept and without(case, [name]) != case]


def narrowed(case: Case, serves: Callable[[Case], bool]) -> tuple[Case, list[str]] | None:
    """The case without as few features as a kernel needs to serve it, and these; None where it
    serves it without none of them, or only without all."""
    names = present(case)
    for count in range(1, len(names)):
        for left_out in itertools.combinations(names, count):
            part = without(case, left_out)
            if serves(part):
                return part, list(left_out)
    return None
