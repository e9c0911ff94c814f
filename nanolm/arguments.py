"""From files and a command line to a typed config.

    YAML files, merged left to right  ->  dotted overrides  ->  frozen dataclasses

The schema depends on names in the config itself (which objective, which plug-ins), so reading has
two passes: the first looks only for `plugins` and for the names of choices, the second parses
everything against the schema that these give. The parsing, `--help` and `--print_config` are
jsonargparse's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import re
from typing import Any

import jsonargparse

from nanolm import strict_yaml
from nanolm.config import CHOICES, Config, choose
from nanolm.errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(schema: type, argv: list[str], *, base: dict | None = None, prog: str) -> Any:
    """An instance of the dataclass `schema` from a base mapping and dotted overrides.

    Raises UserError naming the key for an unknown key, a wrong type or a refused value; prints and
    exits 0 for --help and --print_config.
    """
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", help="YAML file; several merge, left to right")
    parser.add_argument("--print_config", action="store_true", help="Print the config and exit")
    parser.add_class_arguments(schema, None)
    known = {action.dest for action in parser._actions}
    refuse_unknown(flatten(base or {}), known)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            defaults = parser.parse_object(base or {}, defaults=True)
            namespace = parser.parse_args(argv, namespace=defaults)
            wants_print = namespace.pop("print_config")
            namespace.pop("config", None)
            value = parser.instantiate(namespace).as_dict()
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(sentence(error)) from None
    instance = schema(**value)
    if wants_print:
        print(dump(instance), end="")
        raise SystemExit(0)
    return instance


def sentence(error: Exception) -> str:
    """jsonargparse's message, of several lines, as one sentence that begins with the key."""
    text = " ".join(str(error).split())
    text = re.sub(r"^(error: )?Parser key \"([^\"]+)\":", r"\2:", text)
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    text = re.sub(r"[Uu]nrecognized arguments: --(\S+)(.*)", r"\1: there is no such key\2", text)
    return text


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {"a.b": value}; lists and empty mappings are values."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def refuse_unknown(flat: dict[str, Any], known: set[str]) -> None:
    """Raises UserError for the keys that the schema lacks, with those that stand beside them."""
    unknown = [key for key in flat if key not in known]
    if unknown:
        group = unknown[0].rpartition(".")[0]
        siblings = sorted(key for key in known if key.rpartition(".")[0] == group)
        hint = f"; {group or 'the top level'} has: {', '.join(siblings)}" if siblings else ""
        raise UserError(f"unknown key {', '.join(unknown)} in the config{hint}")


def merge(left: dict, right: dict, path: str = "") -> dict:
    """Right's keys over left's, mapping by mapping; a choice whose name changes starts afresh."""
    merged = dict(left)
    for key, value in right.items():
        where, old = f"{path}{key}", merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            renamed = where in CHOICES and value.get("name", old.get("name")) != old.get("name")
            merged[key] = value if renamed else merge(old, value, f"{where}.")
        else:
            merged[key] = value
    return merged


def take_option(argv: list[str], option: str) -> list[str]:
    """All values that the command line gives to `--option VALUE` or `--option=VALUE`."""
    values = []
    for index, word in enumerate(argv):
        if word == f"--{option}" and index + 1 < len(argv):
            values.append(argv[index + 1])
        elif word.startswith(f"--{option}="):
            values.append(word.partition("=")[2])
    return values


def import_plugins(names: Any) -> None:
    """Import each plug-in module; raises UserError naming the one that cannot be imported."""
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"plugins must be a list of module names, not {names!r}")
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"plugins: cannot import {name}: {error}") from error


def load_config(
    argv: list[str], *, schema: type = Config, prog: str = "nanolm train", base: dict | None = None
) -> Config:
    """The run's config from `--config` files and dotted overrides such as `--optim.lr 3e-4`.

    `base` is a mapping that the files are merged onto. Raises UserError.
    """
    import nanolm.build  # noqa: F401, PLC0415  (registers the built-in names)

    merged: dict = base or {}
    for path in take_option(argv, "config"):
        merged = merge(merged, strict_yaml.read_mapping(path))
    plugins = merged.get("plugins") or []
    for text in take_option(argv, "plugins"):
        value = strict_yaml.parse(text, "--plugins")
        plugins = value if isinstance(value, list) else [value]
    import_plugins(plugins)
    names = {}
    for key in CHOICES:
        group = merged
        for part in key.split("."):
            group = group.get(part) if isinstance(group, dict) else None
        given = group.get("name") if isinstance(group, dict) else None
        chosen = (take_option(argv, f"{key}.name") or [given])[-1]
        if chosen is not None:
            names[key] = str(chosen)
        if isinstance(group, dict) and given not in (None, chosen):
            group_name = {"name": chosen}
            merged = merge(merged, nest(key, group_name))
    return parse(choose(names, schema), argv, base=merged, prog=prog)


def nest(key: str, value: Any) -> dict:
    """("a.b", v) -> {"a": {"b": v}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def as_mapping(config: Any) -> dict:
    """A config dataclass as plain nested mappings."""
    return dataclasses.asdict(config)


def dump(config: Any) -> str:
    """A config as YAML that `load_config` reads back as an equal config."""
    return strict_yaml.dump(as_mapping(config))
