"""Files that a command writes: none that it reads, and where they can be written.

`--json PATH` and `--out PATH` take the place of what is there, as `>` does; of what the same
command line names as input they would destroy the only copy. And who names a place where there is
none should hear it before the work, not behind it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from nanolm.errors import UserError

WRITTEN = ("out", "json", "html")
"""The options of all commands that name a file to write."""
BESIDE = ("json", "html")
"""Those that are written beside what the command does, into a folder that exists."""


def require_other_files(arguments: Any) -> None:
    """Raises UserError where one of WRITTEN is a file that another option names, too."""
    for key in WRITTEN:
        path = getattr(arguments, key, None)
        if not (isinstance(path, str) and os.path.isfile(path)):
            continue
        for other, name in named(arguments):
            if other != key and os.path.isfile(name) and os.path.samefile(path, name):
                raise UserError(
                    f"--{key} {path} is the file that is given as {other}, too, and would be "
                    f"written over; name another one"
                )


def require_places(arguments: Any) -> None:
    """Raises UserError where one of BESIDE names a place in no folder, or a folder."""
    for key in BESIDE:
        path = getattr(arguments, key, None)
        if not isinstance(path, str):
            continue
        if os.path.isdir(path):
            raise UserError(f"--{key} {path} is a folder; name a file")
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            raise UserError(
                f"--{key} {path}: there is no folder {folder}; make it, or name a file elsewhere"
            )


def named(arguments: Any) -> Iterator[tuple[str, str]]:
    """(option, text) of all texts on a command line that could be a file's name, also behind a
    source's, as in table:FILE:COLUMN."""
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str):
                yield from ((field.name, part) for part in {text, *text.split(":")})
