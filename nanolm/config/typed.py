"""From plain values (YAML, a command line) to dataclasses, each value checked against its type.

This is the whole type system of configs: dataclasses, int, float, str, bool, Literal, None, and
lists, tuples, mappings and unions of these, and a range where the annotation has one (`ranges.py`).
It converts nothing but an integer where a float is asked for, and every refusal is one sentence
that begins with the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from typing import Any, Literal

from nanolm.config import strict_yaml
from nanolm.config.ranges import WHOLE, Within
from nanolm.errors import UserError

MOST_KEYS_SHOWN = 12
NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


@functools.cache  # annotations are texts, which Python compiles anew whenever it is asked
def fields_of(schema: type) -> dict[str, Any]:
    """{field name: its resolved annotation} of a dataclass, in order."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def instance(schema: Any, mapping: Any, key: str = "") -> Any:
    """The dataclass `schema` from a mapping; `key` is where the mapping stands.

    Raises UserError for an unknown or missing key, a wrong type, or whatever the dataclass refuses.
    """
    where = key or "the config"
    mapping = {} if mapping is None else mapping  # a group whose keys are all commented out
    if not isinstance(mapping, dict):
        raise UserError(f"{where}: expected keys and values, got {mapping!r}")
    kinds = fields_of(schema)
    for name in mapping:
        if name not in kinds:
            raise UserError(unknown_key(str(name), list(kinds), key))
    for field in dataclasses.fields(schema):
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and field.name not in mapping:
            raise UserError(f"{dotted(key, field.name)}: a value is required")
    return schema(
        **{name: checked(kinds[name], mapping[name], dotted(key, name)) for name in mapping}
    )


def checked(kind: Any, given: Any, key: str) -> Any:
    """The given value as an instance of the annotation `kind`; raises UserError naming the key."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        if type(given) is int:  # its own range first: that of all integers would mislead
            within(kind.__metadata__, float(given) if parts[0] is float else given, key)
        return within(kind.__metadata__, checked(parts[0], given, key), key)
    if dataclasses.is_dataclass(kind):
        return instance(kind, given, key)
    if is_union(kind):
        meant = member(parts, given)
        return refuse(kind, given, key) if meant is None else checked(meant, given, key)
    if origin is list and isinstance(given, list):
        return [checked(parts[0], item, f"{key}[{i}]") for i, item in enumerate(given)]
    if origin is dict and isinstance(given, dict):
        return {name: checked(parts[1], item, dotted(key, name)) for name, item in given.items()}
    if origin is tuple and isinstance(given, (list, tuple)) and len(given) == len(parts):
        pairs = enumerate(zip(parts, given))
        return tuple(checked(part, item, f"{key}[{i}]") for i, (part, item) in pairs)
    if kind is Any or (origin is Literal and type(given) in map(type, parts) and given in parts):
        return given
    if kind is float and type(given) in (int, float) and math.isfinite(given):
        return float(given)
    if kind in NAMES and kind is not float and type(given) is kind:
        return within((WHOLE,) if kind is int else (), given, key)
    if kind is type(None) and given is None:
        return given
    return refuse(kind, given, key)


def within(ranges: tuple[Within, ...], value: Any, key: str) -> Any:
    """The value; raises UserError, naming the key, unless it lies in every range."""
    for limits in ranges:
        if wanted := limits.broken(value):
            raise UserError(f"{key}={value} must be {wanted}")
    return value


def require_ranges(config: Any) -> None:
    """Raises UserError for the first field of a dataclass, made in Python, that is not what its
    annotation says."""
    schema: Any = type(config)
    for name, kind in fields_of(schema).items():
        checked(kind, getattr(config, name), name)


def bare(kind: Any) -> Any:
    """An annotation without the range that it may have."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def members(kind: Any) -> tuple:
    """The members of a union, or the annotation itself, without ranges."""
    return tuple(map(bare, typing.get_args(kind) if is_union(kind) else (kind,)))


def is_union(kind: Any) -> bool:
    """Whether an annotation is `X | Y`."""
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def member(kinds: tuple, given: Any) -> Any:
    """The member of a union that a value is meant as, judged by its outermost type, or None."""
    exact = [kind for kind in kinds if bare(kind) is type(given)]
    return next(iter([*exact, *(kind for kind in kinds if type(given) in outer_types(kind))]), None)


def outer_types(kind: Any) -> tuple:
    """The types that a plain value meant as `kind` may have."""
    kind = bare(kind)
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) or origin is dict:
        return (dict,)
    if origin in (list, tuple):
        return (list, tuple)
    if origin is Literal:
        return tuple(map(type, typing.get_args(kind)))
    return (int, float) if kind is float else (kind,)


def refuse(kind: Any, given: Any, key: str) -> Any:
    """Raises the UserError of a value of the wrong type."""
    plain = {"None": "null", "True": "true", "False": "false"}
    shown = plain.get(repr(given), repr(given))
    raise UserError(f"{key}: expected {described(kind)}, got {shown}")


def described(kind: Any) -> str:
    """An annotation in words."""
    kind = bare(kind)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return "null"
    if is_union(kind):
        return " or ".join(described(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is list:
        return f"a list, each item {described(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}: {', '.join(described(part) for part in parts)}"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "keys and values"
    return NAMES.get(kind, str(kind))


def unknown_key(name: str, known: list[str], group: str = "") -> str:
    """The sentence for a key that the schema lacks."""
    key, known = dotted(group, name), [dotted(group, other) for other in known]
    near = difflib.get_close_matches(key, known, n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    if len(known) > MOST_KEYS_SHOWN:
        return f"{key}: there is no such key{guess}; --help lists all"
    return f"{key}: there is no such key{guess}; there are {', '.join(known)}"


def dotted(group: str, name: str) -> str:
    """The full key of a field in a group."""
    return f"{group}.{name}" if group else str(name)


def from_words(kind: Any, words: list[str], key: str) -> Any:
    """The plain value that a command line's words mean for a field of this kind.

    Text is taken literally, so `--run.dir 2024` is a folder; the rest is read as YAML. Several
    words, or one that is not in brackets, make a list where a list is asked for; no word means true
    where a truth value is asked for. Raises UserError when the number of words is wrong.
    """
    parts = members(kind)
    listed = next((part for part in parts if typing.get_origin(part) in (list, tuple)), None)
    if not words and bool in parts:
        return True
    if words == ["null"] and type(None) in parts:
        return None
    if bool in parts and len(words) == 1 and words[0].lower() in ("true", "false"):
        return words[0].lower() == "true"
    if len(words) == 1 and words[0] in named_values(parts):
        return words[0]
    if listed is not None and not (len(words) == 1 and words[0].startswith("[")):
        item = typing.get_args(listed)[0]
        return [from_words(item, [word], key) for word in words]
    if len(words) != 1:
        raise UserError(f"{key}: expected {described(kind)}, got {' '.join(words) or 'nothing'}")
    textual = str in parts or all(typing.get_origin(part) is Literal for part in parts)
    return words[0] if textual else strict_yaml.parse(words[0], f"--{key}")


def named_values(parts: tuple) -> list[Any]:
    """The values that the Literals among a union's members name."""
    literals = [part for part in parts if typing.get_origin(part) is Literal]
    return [value for literal in literals for value in typing.get_args(literal)]


def n_words(kind: Any, words: list[str]) -> int:
    """How many of the words behind an option belong to it, by the field's kind."""
    parts = members(kind)
    if any(typing.get_origin(part) in (list, tuple) for part in parts):
        return len(words)
    if bool in parts:
        return int(bool(words) and words[0].lower() in ("true", "false"))
    return min(1, len(words))
