"""Where a function stands, asked of the function itself, so that it cannot go stale."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable
from types import CodeType
from typing import Any

import nanolm

ROOT = pathlib.Path(nanolm.__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Place:
    """A function by the file and the line of its `def`, and its name."""

    path: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.name}"


def place_of(function: Callable[..., Any]) -> Place:
    """The place of a function, a method or a partial of one; raises TypeError for anything that
    has no Python code."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            break
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        raise TypeError(f"{function!r} has no Python code to point at")
    path = pathlib.Path(code.co_filename)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return Place(shown.as_posix(), line_of_def(code), code.co_qualname)


def line_of_def(code: CodeType) -> int:
    """The line of `def`: a code object begins at the first decorator, if there is one."""
    lines, first = inspect.getsourcelines(code)
    for number, line in enumerate(lines, start=first):
        if line.lstrip().startswith(("def ", "async def ", "lambda")):
            return number
    return code.co_firstlineno
