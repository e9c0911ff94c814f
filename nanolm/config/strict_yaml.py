"""YAML as people expect it: 3e-4 is a number, a key stands once, nothing in a file can run code.

PyYAML follows YAML 1.1, which reads 3e-4, yes, 010, 1:30 and 2024-01-01 as text, true, 8, 90 and a
date, and silently keeps the last of two equal keys. Plain words are read here by the core schema of
YAML 1.2 (section 10.3.2), and written by the same rules: a text that would be read as something
else is quoted, so that what `dump` writes is what `parse` reads.
"""

from __future__ import annotations

import copy
import functools
import pathlib
import re
from typing import Any

import yaml

from nanolm.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """SafeLoader of YAML 1.2's core schema that refuses duplicate keys."""

    yaml_implicit_resolvers: dict = {}

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

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """Decimal, however many zeros it begins with; 0x and 0o tell other bases."""
        text = self.construct_scalar(node)
        base = {"0x": 16, "0o": 8}.get(text.lstrip("+-")[:2], 10)
        return int(text, base)


class StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes what `StrictLoader` would read as anything but text."""

    yaml_implicit_resolvers = StrictLoader.yaml_implicit_resolvers

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Line ends of all kinds and what no eye sees as escapes: PyYAML folds and loses them."""
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


for kind, pattern, first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?([0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", "<<", ["<"]),
):
    whole = re.compile(rf"(?:{pattern})\Z", re.ASCII)
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", whole, first)
StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_integer)
StrictDumper.add_representer(str, StrictDumper.represent_text)


MOST_NESTING = 100
"""Brackets inside brackets: PyYAML's time grows with the square of them."""


def parse(text: str, origin: str) -> Any:
    """The value of a YAML text; raises UserError that names `origin` and the line."""
    if _brackets(text) > MOST_NESTING and _nests_too_deeply(text):
        raise UserError(f"{origin} is not valid YAML: more than {MOST_NESTING} brackets are open")
    try:
        return copy.deepcopy(_value(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{origin}{where} is not valid YAML: {problem}") from None


@functools.lru_cache(maxsize=64)
def _value(text: str) -> Any:
    """PyYAML takes 10 ms for a run's config, and one that begins from another run reads that run's
    five times."""
    return yaml.load(text, Loader=StrictLoader)


def _nests_too_deeply(text: str) -> bool:
    """Whether more brackets are open at once than may be, those in quoted texts not counted."""
    depth = 0
    try:
        for token in yaml.scan(text, Loader=StrictLoader):
            depth += isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
            depth -= isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken)
            if depth > MOST_NESTING:
                return True
    except yaml.YAMLError:  # which parsing tells better
        return False
    return False


def _brackets(text: str) -> int:
    """Most brackets that are open at once, wherever they stand."""
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
    return yaml.dump(value, Dumper=StrictDumper, sort_keys=False, allow_unicode=True)
