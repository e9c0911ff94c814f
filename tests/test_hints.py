"""What a refusal tells its reader to do exists: options, keys and commands in all messages.

Every sentence that can become a UserError is read out of the sources; what it names must be an
option of the command that it names, or of the one whose module it stands in, or of some command.
"""

import ast
import functools
import re
import shlex
import shutil
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
from tests.finetuned import QUIET
from tests.kinds_of_run import call, data_of, pretrained, tuned, words_of
from tests.prepared import prepared_corpus
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
        if any(word in (source := path.read_text(encoding="utf-8")) for word in RAISING)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", None)) in RAISING
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


def refused(*words: str) -> str:
    """The sentence that a command line is refused with."""
    done = call([str(word) for word in words])
    assert done.status == 2, done
    return done.err.removeprefix("nanolm: ").rstrip("\n")


def follow(sentence: str, **given: str) -> None:
    """Runs the command that a sentence quotes, its words in CAPITALS replaced."""
    command = next(text for text in QUOTED.findall(sentence) if text.startswith("nanolm "))
    words = [given.get(word, word) for word in shlex.split(command)[1:]]
    done = call(words)
    assert done.status == 0, done


def test_a_comparison_that_asks_for_an_evaluation_finds_it_afterwards(tmp_path):
    run = shutil.copytree(tuned("classify"), tmp_path / "run")
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    follow(refused("compare", run, run))
    assert call(["compare", str(run), str(run)]).status == 0
    assert "`nanolm runs`" in refused("compare", pretrained("clm"), run)


def test_an_adapter_that_is_no_base_is_one_when_it_is_merged(tmp_path):
    words = [f"--data.path={data_of('classify')}", *words_of("classify"), *QUIET]
    words.append(f"--run.dir={tmp_path / 'run'}")
    adapter = tuned("classify", "--peft.name=lora")
    follow(refused("finetune", *words, "--init_from", adapter), FOLDER=str(tmp_path / "merged"))
    assert call(["finetune", *words, "--init_from", str(tmp_path / "merged")]).status == 0


def test_a_config_that_is_given_like_a_file_is_named_as_told(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 3}\n")
    told = re.search(r"--config \S+", refused("train", tmp_path / "a.yaml"))[0]
    assert call(["train", *told.split(), "--print_config"]).status == 0


def test_a_csv_is_read_as_told(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("text,label\n" + "Some words.,a\nOther words here.,b\n" * 20)
    out = [f"--out={tmp_path / 'out'}", "--workers=1"]
    out.append(f"--tokenizer={prepared_corpus() / 'tokenizer.model'}")
    told = re.search(r"table:\S+", refused("prepare", source, *out))[0]
    told = told.rstrip(".,;").replace("COLUMN", "text").replace("FILE", str(source))
    assert call(["prepare", told, *out]).status == 0


def test_there_are_many_hints():
    assert len(hints()) > 300 and len(HINTS) > 60
