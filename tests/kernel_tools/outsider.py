"""A right kernel of an op, and how a wrong one is made of it: one thing is changed, as a person
would."""

from __future__ import annotations

import dataclasses
from typing import Any

from nanolm.ops.contract import KERNELS, candidates


def right(op: str) -> Any:
    """The op's definition."""
    candidates(op)
    return KERNELS[op].get("reference").build().run


class Outsider:
    """A kernel that serves everything by a function, unless `refuses` says otherwise."""

    name = "outsider"

    def __init__(self, run, refuses=lambda spec: None):
        self.run, self.why_not = run, refuses


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A wrong kernel: its op, what makes it, and what `kernels check` must say."""

    name: str
    op: str
    make: Any
    words: str
    refuses: Any = lambda spec: None
    at: str | None = None
    """The check that must say it, where one is known: the others need not be asked."""

    def kernel(self):
        return Outsider(self.make(right(self.op)), self.refuses)


WRONG = []


def wrong(op, words, refuses=lambda spec: None, *, at=None):
    """Decorator: enters a function that makes a wrong `run` of a right one."""

    def enter(make):
        WRONG.append(Wrong(make.__name__, op, make, words, refuses, at))
        return make

    return enter


def no_dropout(spec):
    return "it has no dropout" if getattr(spec, "dropout", 0) else None
