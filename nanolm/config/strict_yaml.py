"""YAML as people expect it: 3e-4 is a number, a key stands once, nothing in a file can run code.

PyYAML follows YAML 1.1, which reads 3e-4 as a string and silently keeps the last of two equal keys.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import yaml

from nanolm.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads every float that Python reads."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of a node; raises ConstructorError for a key that stands twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):  # <<: *anchor, whose keys may be overridden
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} cannot be a key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


MOST_NESTING = 100
"""Brackets inside brackets: PyYAML's time grows with the square of them."""


def parse(text: str, origin: str) -> Any:
    """The value of a YAML text; raises UserError that names `origin` and the line."""
    if _nesting(text) > MOST_NESTING:
        raise UserError(f"{origin} is not valid YAML: more than {MOST_NESTING} brackets are open")
    try:
        return yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{origin}{where} is not valid YAML: {problem}") from None


def _nesting(text: str) -> int:
    """Most brackets that are open at once."""
    depth = most = 0
    for bracket in re.findall(r"[\[{}\]]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        most = max(most, depth)
    return most


def read_mapping(path: str | pathlib.Path) -> dict:
    """The mapping in a YAML file; raises UserError when it is missing or not a mapping."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the config {path}: {reason}") from None
    value = parse(text, str(path))
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold keys and values at its top level")
    return value


def dump(value: Any) -> str:
    """YAML text that `parse` reads back as the same value."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
