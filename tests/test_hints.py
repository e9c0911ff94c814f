"""What a refusal tells its reader to do exists: options, keys and commands in all messages.

Every sentence that can become a UserError is read out of the sources; what it names must be an
option of the command that it names, or of the one whose module it stands in, or of some command.
"""

import ast
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from nanolm import cli
from nanolm.config.choices import CHOICES, choose
from nanolm.config.load import leaf_kinds
from nanolm.config.schema import Config
from nanolm.finetune.config import TaskConfig
from nanolm.registry import OBJECTIVES
from tests.command_walk import schema_of
from tests.test_imports import MODULES

RAISING = ("UserError", "require", "Refused")
OPTION = re.compile(r"(?<![\w-])--([a-z][\w.]*)")
QUOTED = re.compile(r"`([^`]*)`")
OTHERS = {"nproc_per_node", "help", "config", "print_config"}
"""Options of torchrun, and those that every command has."""
LAUNCHED = {"nanolm.tools.first_contact", "nanolm.finetune.study", "nanolm.tools.kernel_check"}
"""Rooms with command lines of their own."""


class Hint(NamedTuple):
    """A sentence of a module that can be raised."""

    module: str
    line: int
    text: str


def texts(node: ast.AST) -> str:
    """All the text of an expression in order; what is put in at run time reads …."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            "…" if isinstance(part, ast.FormattedValue) else texts(part) for part in node.values
        )
    if isinstance(node, ast.FormattedValue):
        return "…"
    return " ".join(filter(None, map(texts, ast.iter_child_nodes(node))))


@functools.cache
def hints() -> list[Hint]:
    """Every sentence of a call that raises a UserError, and every constant that goes into one."""
    return [
        Hint(name, node.lineno, text)
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in RAISING
        and (text := texts(node)).strip()
    ]


@functools.cache
def options() -> dict[str, set[str]]:
    """{command: its options}, whichever names are chosen."""
    found = {command: set(leaf_kinds(schema_of(command))) for command in cli.COMMANDS}
    for schema, commands in ((Config, ("train", "profile")), (TaskConfig, ("finetune",))):
        keys = set(leaf_kinds(schema))
        for key, registry in CHOICES.items():
            for name in registry.names():
                wanted = (
                    getattr(OBJECTIVES.get(name).build, "schema", Config)
                    if (key == "objective")
                    else schema
                )
                if wanted is schema:
                    keys |= set(leaf_kinds(choose({key: name}, schema)))
        for command in commands:
            found[command] |= keys
    return found


def named(hint: Hint) -> Iterator[tuple[str, set[str]]]:
    """(option, the options one of which it must be) for every option that a sentence names."""
    everywhere = set().union(*options().values(), OTHERS)
    command = next(
        (name for name, (module, _) in cli.COMMANDS.items() if module == hint.module), None
    )
    own = options()[command] | OTHERS if command else everywhere
    for quoted in QUOTED.findall(hint.text):
        words = quoted.removeprefix("nanolm ").split()
        other = next((n for n in (2, 1) if " ".join(words[:n]) in cli.COMMANDS), None)
        if quoted.startswith("nanolm ") and other:
            for option in OPTION.findall(quoted):
                yield option, options()[" ".join(words[:other])] | OTHERS
        elif quoted.startswith("nanolm ") and words[0] not in ("…", "COMMAND"):
            yield f"`{quoted}`", set()
    for option in OPTION.findall(QUOTED.sub("", hint.text)):
        yield option, own


HINTS = [hint for hint in hints() if OPTION.search(hint.text) or "`nanolm " in hint.text]


@pytest.mark.parametrize("hint", HINTS, ids=lambda hint: f"{hint.module}:{hint.line}")
def test_every_option_that_a_refusal_names_exists(hint):
    for option, known in named(hint):
        option = option.rstrip(".")
        assert option in known, f"{hint.module}:{hint.line} names {option}: {hint.text}"


GROUPS = "model|data|objective|optim|schedule|peft|tune|train|eval|kernels|distributed|augment|run"
KEY = re.compile(rf"(?<![\w./-])(?:{GROUPS})\.[a-z_]+(?:\.[a-z_]+)*(?![\w(]|…|/)")
KEYED = [hint for hint in hints() if KEY.search(hint.text)]


@pytest.mark.parametrize("hint", KEYED, ids=lambda hint: f"{hint.module}:{hint.line}")
def test_every_key_that_a_refusal_names_exists(hint):
    keys = set().union(*options().values())
    groups = {key.rpartition(".")[0] for key in keys}
    for key in KEY.findall(hint.text):
        assert key in keys | groups, f"{hint.module}:{hint.line} names {key}: {hint.text}"


@pytest.mark.parametrize(
    "text", ["give it with --no_such_option", "first run `nanolm evaluate … --out …`", "`nanolm x`"]
)
def test_a_hint_that_cannot_be_followed_is_found(text):
    for option, known in named(Hint("nanolm.commands.compare", 1, text)):
        assert option not in known


def test_there_are_many_hints():
    assert len(hints()) > 300 and len(HINTS) > 60
