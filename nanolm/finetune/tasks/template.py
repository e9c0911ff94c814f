"""Templates of prompts: {column} stands for a column of the record, other braces for themselves.

`str.format` would read a template that holds JSON as a broken one, and write "None" where a record
has null.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nanolm.errors import UserError

FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def filled(template: str, values: Mapping[str, Any], key: str) -> str:
    """The template with each {column} replaced by its value, null by nothing; {{ and }} are single
    braces. Raises UserError, naming the config's `key`, for a name that is no column."""

    def value(found: re.Match) -> str:
        name = found.group(1)
        if name is None:
            return found.group()[0]
        if name not in values:
            raise UserError(
                f"{key} names {{{name}}}, which is no column; there are {', '.join(values)}; "
                f"double braces that stand for themselves"
            )
        return "" if values[name] is None else str(values[name])

    return FIELD.sub(value, template)
