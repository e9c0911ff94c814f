"""What commands share when they report: the same figures on the terminal and, with --json, in a
file."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from nanolm.errors import UserError


def write_json(path: str | None, figures: Any) -> None:
    """Write the figures to `path` unless it is None; raises UserError when that fails."""
    if path is None:
        return
    try:
        text = json.dumps(figures, indent=2, ensure_ascii=False)
        pathlib.Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --json {path}: {error.strerror}") from None
