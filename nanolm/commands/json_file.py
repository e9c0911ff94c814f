"""What commands share when they report: the same figures on the terminal and, with --json, in a
file."""

from __future__ import annotations

import pathlib
from typing import Any

from nanolm.errors import UserError
from nanolm.files import json_text


def write_json(path: str | None, figures: Any) -> None:
    """Write the figures to `path` unless it is None; raises UserError when that fails."""
    if path is None:
        return
    try:
        # In place: PATH may be a pipe or /dev/stdout, which no file may take the place of.
        pathlib.Path(path).write_text(json_text(figures), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --json {path}: {error.strerror}") from None
