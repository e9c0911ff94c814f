"""Files that a command writes are none that it reads.

`--json PATH` and `--out PATH` take the place of what is there, as `>` does; of what the same
command line names as input they would destroy the only copy.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from nanolm.errors import UserError

WRITTEN = ("out", "json", "html")
"""The options of all commands that name a file to write."""


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


def named(arguments: Any) -> Iterator[tuple[str, str]]:
    """(option, text) of all texts on a command line that could be a file's name, also behind a
    source's, as in table:FILE:COLUMN."""
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str):
                yield from ((field.name, part) for part in {text, *text.split(":")})
