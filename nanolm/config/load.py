"""From files and a command line to a typed config.

    YAML files, merged left to right  ->  dotted overrides  ->  frozen dataclasses

The schema depends on names in the config itself (which objective, which plug-ins), so reading has
two passes: the first looks only for `plugins` and for the names of choices, the second reads
everything against the schema that these give (`typed.py`). `--help` is jsonargparse's.

The grammar of every command: `--key value`, `--key=value`, `--list a b c`, `--flag`, and words
without a key for the fields that the command calls positional.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import pathlib
import re
import shutil
import sys
import sysconfig
import traceback
from typing import Any, TypeVar, overload

from nanolm.config import strict_yaml
from nanolm.config.choices import CHOICES, choose, registered_names, widen
from nanolm.config.schema import Config
from nanolm.config.typed import dotted, fields_of, from_words, instance, n_words, unknown_key
from nanolm.config.written import require_other_files, require_places
from nanolm.errors import UserError
from nanolm.terminal import wrapped

Words = dict[str, list[str]]
S = TypeVar("S")


@overload
def load_config(argv: list[str], *, prog: str = ..., base: dict | None = ...) -> Config: ...


@overload
def load_config(
    argv: list[str], *, schema: type[S], prog: str = ..., base: dict | None = ...
) -> S: ...


def load_config(
    argv: list[str], *, schema: type = Config, prog: str = "nanolm train", base: dict | None = None
) -> Any:
    """The run's config from `--config` files and dotted overrides such as `--optim.lr 3e-4`.

    `base` is a mapping that the files are merged onto. Raises UserError; prints and exits 0 for
    --help and --print_config.
    """
    words = split_words(argv)
    merged = read_files(words, base or {})
    if "plugins" in words:
        merged = merged | {"plugins": from_words(list[str], words["plugins"], "plugins")}
    import_plugins(merged.get("plugins", []))
    for key in CHOICES:
        if f"{key}.name" in words:
            name = from_words(str, words[f"{key}.name"], f"{key}.name")
            merged = merge(merged, nest(f"{key}.name", name))
    names = {key: name for key in CHOICES if isinstance(name := look_up(merged, key), str)}
    return parse(choose(names, schema), argv, base=base, prog=prog)


def parse(
    schema: type,
    argv: list[str],
    *,
    base: dict | None = None,
    prog: str,
    positional: tuple[str, ...] = (),
) -> Any:
    """An instance of the dataclass `schema`: a base mapping, `--config` files, then overrides.

    `positional` names the fields that words without a key fill, in this order.

    Raises UserError naming the key; prints and exits 0 for --help and --print_config.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(schema, prog, positional), end="")
        raise SystemExit(0)
    words = split_words(argv)
    merged = read_files(words, base or {})
    wants_print = words.pop("print_config", None) is not None
    overrides = read_words(schema, words, positional)
    # Names first: an option of a choice must not be lost when the name that follows changes it.
    for key, value in sorted(overrides.items(), key=lambda item: not item[0].endswith(".name")):
        merged = merge(merged, nest(key, value))
    value = widen(instance(schema, merged))
    if wants_print:
        print(dump(value), end="")
        raise SystemExit(0)
    require_other_files(value)
    require_places(value)
    return value


def read_words(schema: type, words: Words, positional: tuple[str, ...]) -> dict[str, Any]:
    """{dotted key: plain value} of a split command line; raises UserError naming the key."""
    leaves, loose = leaf_kinds(schema), list(words.pop("", []))
    for key in words:
        if key not in leaves:
            raise UserError(unknown_option(key, leaves))
        count = n_words(leaves[key], words[key])
        loose += words[key][count:]
        words[key] = words[key][:count]
    for key in positional:
        if loose and key not in words:
            count = n_words(leaves[key], loose)
            words[key], loose = loose[:count], loose[count:]
    if loose:
        written = "options are written --key value"
        if loose[0].lower().endswith((".yaml", ".yml")):
            written = f"a config file is named by --config {loose[0]}"
        raise UserError(f"{loose[0]!r} belongs to no option; {written}")
    return {key: from_words(leaves[key], values, key) for key, values in words.items()}


def split_words(argv: list[str]) -> Words:
    """{key: words} of a command line; "" holds the words that stand before any key.

    A value that begins with two dashes is written --key=value. `--config` adds up; any other key
    that stands twice means its last value.
    """
    words: Words = {"": []}
    current = words[""]
    for word in argv:
        if word.startswith("--") and word != "--":
            key, equals, value = word[2:].partition("=")
            if key != "config":
                words.pop(key, None)
            current = words.setdefault(key, [])
            if equals:
                current.append(value)
                current = words[""]
        else:
            current.append(word)
    return words if words[""] else words | {"": []}


def read_files(words: Words, base: dict) -> dict:
    """`base` with the `--config` files merged onto it, left to right; takes them out of `words`."""
    if words.get("config") == []:
        raise UserError("config: expected a YAML file, got nothing")
    for path in words.pop("config", []):
        base = merge(base, strict_yaml.read_mapping(path))
    return base


def merge(left: dict, right: dict, path: str = "") -> dict:
    """Right's keys over left's, mapping by mapping; a choice whose name changes starts afresh."""
    merged = dict(left)
    for key, value in right.items():
        where, old = f"{path}{key}", merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            named = where in CHOICES and "name" in old and "name" in value
            renamed = named and value["name"] != old["name"]
            merged[key] = value if renamed else merge(old, value, f"{where}.")
        else:
            merged[key] = value
    return merged


def nest(key: str, value: Any) -> dict:
    """("a.b", v) -> {"a": {"b": v}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def look_up(mapping: dict, choice: str) -> Any:
    """The name that a mapping gives to a choice, or None."""
    value: Any = mapping
    for part in [*choice.split("."), "name"]:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def leaf_kinds(schema: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: annotation} of every field that is not itself a group of fields."""
    leaves: dict[str, Any] = {}
    for name, kind in fields_of(schema).items():
        key = dotted(prefix, name)
        leaves |= leaf_kinds(kind, key) if dataclasses.is_dataclass(kind) else {key: kind}
    return leaves


def unknown_option(key: str, leaves: dict[str, Any]) -> str:
    """The sentence for an option that the schema lacks, or that names a group."""
    inside = [leaf for leaf in leaves if leaf.startswith(f"{key}.")]
    if inside:
        return f"{key}: this is a group of keys; give one of them, such as --{inside[0]}"
    group = key.rpartition(".")[0]
    beside = [leaf for leaf in leaves if leaf.rpartition(".")[0] == group]
    return unknown_key(key, beside or list(leaves))


def import_plugins(names: Any) -> None:
    """Import each plug-in module, from the current folder too; raises UserError naming the one that
    cannot be imported."""
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"plugins: expected a list of module names, got {names!r}")
    # `python -m nanolm` looks there by itself, the script `nanolm` does not.
    if names and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    for name in names:
        refuse_path(name)
        try:
            importlib.import_module(name)
        except UserError:  # of what it registers: that is said in a sentence of its own
            raise
        except SyntaxError as error:
            raise UserError(
                f"plugins: cannot import {name}: {error.msg} in {error.filename}, line "
                f"{error.lineno}; correct that line"
            ) from error
        except (Exception, SystemExit) as error:  # a stranger's module may raise anything
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            raise UserError(
                f"plugins: cannot import {name}: {kind}{error}{place_of(error)}"
            ) from error


def refuse_path(name: str) -> None:
    """Raises UserError for what is no module's name but meant as one: a file, or several names."""
    if "," in name:
        apart = name.replace(",", " ").split()
        raise UserError(
            f"plugins: cannot import {name}: it is read as one name; write --plugins "
            f"{' '.join(apart)}, and in a config plugins: [{', '.join(apart)}]"
        )
    if os.sep in name or name.endswith(".py"):
        path = pathlib.PurePath(os.path.relpath(name) if os.path.isabs(name) else name)
        parts = [part for part in path.with_suffix("").parts if part not in (".", "..")]
        outside = ".." in path.parts
        raise UserError(
            f"plugins: cannot import {name}: that is a file, and a module's name is due, "
            f"{parts[-1] if outside else '.'.join(parts)}"
            f"{', with its folder in PYTHONPATH' * outside}"
        )


def place_of(error: BaseException) -> str:
    """File and line at which importing a module went wrong: the last that is neither the import
    system's nor a library's, else the last; nothing where no line of a module was reached."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__
        and not frame.filename.startswith("<frozen")
        and frame.filename != importlib.__file__
    ]
    libraries = tuple(filter(None, map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return "".join(f" ({f.filename}, line {f.lineno})" for f in (own or frames)[-1:])


def help_text(schema: type, prog: str, positional: tuple[str, ...]) -> str:
    """Every option with its type, default and docstring; raises UserError without jsonargparse."""
    try:
        import jsonargparse  # noqa: PLC0415  (slow to import, and only needed here)
    except ImportError as error:
        raise UserError(
            f"--help is written by jsonargparse, and it cannot be imported ({error}): "
            f"pip install 'jsonargparse[signatures]'; --print_config shows all keys without it"
        ) from error

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    words = "".join(f"[{key.upper()}] " for key in positional)
    parser = jsonargparse.ArgumentParser(
        prog=prog, usage=f"{prog} {words}[--config FILE …] [--KEY VALUE …]"
    )
    parser.add_argument("--config", help="YAML file; several merge, left to right", metavar="FILE")
    parser.add_argument("--print_config", action="store_true", help="print the config and exit")
    parser.add_class_arguments(schema, None)
    for action in parser._actions:
        if action.help == "Path to a configuration file." or action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS
        names = registered_names(action.dest, schema)
        if names is not None:
            action.help = f"{action.help} One of {', '.join(names)}, or a plug-in's."
        action.option_strings = [s for s in action.option_strings if not s.endswith("+")]
    text = re.sub(r"Annotated\[([^]]+)\]", r"\1", parser.format_help())
    # argparse wraps what is told of an option; its title, its choices and the usage stay whole.
    width = shutil.get_terminal_size().columns
    return "".join(f"{part}\n" for line in text.splitlines() for part in wrapped(line, width))


def as_mapping(config: Any) -> dict:
    """A config dataclass as plain nested mappings."""
    return dataclasses.asdict(config)


def dump(config: Any) -> str:
    """A config as YAML that `load_config` reads back as an equal config."""
    return strict_yaml.dump(as_mapping(config))
