"""Every command answers or refuses in one sentence, whatever its words, run and streams are.

The cells are told in `tests/command_walk.py`. A seeded sample is walked here; `pytest -m slow
tests/test_command_walk.py -s` walks all of them and prints how many there are.
"""

import collections
import dataclasses
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import Annotated

import pytest

from nanolm import cli
from nanolm.config.load import leaf_kinds, parse
from nanolm.config.ranges import Amount, Count, Decay, Fraction, Seed, Share, Within
from nanolm.errors import UserError
from nanolm.files import REMEDIES, json_text
from tests.command_walk import ROOT, Cell, cells, line_of, schema_of, walk
from tests.kinds_of_run import KINDS
from tests.prepared import prepared_corpus, trained_run

SAMPLED = 12


def failures(some: list[Cell], folder) -> list[str]:
    """What was said by the cells that do not pass."""
    found, answers = [], collections.Counter()
    for number, cell in enumerate(some):
        answer = walk(cell, folder / str(number))
        answers["traceback" if isinstance(answer.status, str) else answer.status] += 1
        if not answer.passes:
            found.append(f"{cell}: status {answer.status}\n{answer.err}")
    print(f"{len(some)} of {len(cells())} cells: {dict(answers)}")
    return found


def test_a_sample_of_the_walk(tmp_path):
    dear = {"finetune", "profile", "study"}  # a study makes processes, as a kind of run too
    cheap = [cell for cell in cells() if not dear & {cell.command, cell.kind}]
    assert not failures(random.Random(17).sample(cheap, SAMPLED), tmp_path)


@pytest.mark.slow
def test_the_whole_walk(tmp_path):
    assert not failures(cells(), tmp_path)


def test_the_walk_knows_every_command_and_kind():
    walked = {cell.command for cell in cells()}
    assert walked == set(cli.COMMANDS)
    assert {cell.kind for cell in cells() if cell.command == "generate"} == set(KINDS)


NUMBERS = [
    (kind, f"{command} --{key}")
    for command in cli.COMMANDS
    for key, kind in leaf_kinds(schema_of(command)).items()
    if command not in ("train", "profile", "finetune")  # their groups check themselves
    and "int" in str(kind).replace("Literal", "")
    and "Any" not in str(kind)
]


@pytest.mark.parametrize(("kind", "option"), NUMBERS, ids=[option for _, option in NUMBERS])
def test_every_whole_number_of_a_command_says_its_range(kind, option):
    assert "Annotated" in str(kind), f"{option}: give it a type of nanolm/config/ranges.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd:
    """One option of each range."""

    count: Count = 1
    """a."""
    amount: Amount = 0
    """b."""
    seed: Seed = 0
    """c."""
    share: Share = 1.0
    """d."""
    decay: Decay = 0.0
    """e."""
    fraction: Fraction | None = None
    """f."""
    several: list[Annotated[int, Within(2, 4)]] = dataclasses.field(default_factory=list)
    """g."""
    whole: int = 0
    """h."""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--count=0"], "count=0 must be at least 1"),
        (["--amount=-1"], "amount=-1 must be at least 0"),
        (["--amount=-1" + "0" * 30], f"amount=-1{'0' * 30} must be at least 0"),
        (["--seed=4294967296"], "seed=4294967296 must be at most 4294967295"),
        (["--share=0"], "share=0.0 must be more than 0"),
        (["--decay=1"], "decay=1.0 must be less than 1"),
        (["--fraction=1.5"], "fraction=1.5 must be at most 1"),
        (["--several", "3", "5"], "several[1]=5 must be at most 4"),
        (["--whole=1" + "0" * 30], f"whole=1{'0' * 30} must be at most {(1 << 63) - 1}"),
    ],
)
def test_a_range_is_checked_where_the_type_is(words, sentence):
    with pytest.raises(UserError) as error:
        parse(Odd, words, prog="x")
    assert str(error.value) == sentence


def test_help_shows_ranges_as_words(capsys):
    with pytest.raises(SystemExit):
        parse(Odd, ["--help"], prog="x")
    text = " ".join(capsys.readouterr().out.split())
    assert "Annotated" not in text
    assert "(type: int, at least 0, at most 2147483648, default: 0)" in text


@pytest.mark.parametrize("number", REMEDIES)
def test_what_the_disk_refuses_is_one_sentence(number, monkeypatch, capsys):
    def refused(arguments):
        raise OSError(number, os.strerror(number), "some/where")

    monkeypatch.setattr(importlib.import_module("nanolm.commands.runs"), "run", refused)
    with pytest.raises(SystemExit) as end:
        cli.main(["runs"])
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1
    assert told.startswith("nanolm: cannot use some/where: ")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
    ],
)
def test_too_little_memory_is_one_sentence(error, monkeypatch, capsys):
    def wrong(arguments):
        raise error

    monkeypatch.setattr(importlib.import_module("nanolm.commands.runs"), "run", wrong)
    with pytest.raises(SystemExit) as end:
        cli.main(["runs"])
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1
    assert told.startswith(f"nanolm: {cli.OUT_OF_MEMORY}")


@pytest.mark.parametrize("error", [KeyError("memory"), RuntimeError("a bug")])
def test_other_errors_keep_their_traceback(error, monkeypatch):
    def wrong(arguments):
        raise error

    monkeypatch.setattr(importlib.import_module("nanolm.commands.runs"), "run", wrong)
    with pytest.raises(type(error)):
        cli.main(["runs"])


def test_json_of_a_name_that_is_no_text_reads_back():
    value = {"na\udcefve": ["\udcff", "ü", "\U0001f600"]}
    assert json.loads(json_text(value).encode()) == value


def process(command: str, **options) -> subprocess.Popen:
    """A command in a process of its own."""
    words = [*command.split(), *line_of(command, str(trained_run("clm")))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "nanolm", *words], env=environment, stderr=subprocess.PIPE, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "data verify", "estimate", "predict"])
def test_closed_pipes_and_ctrl_c(command, tmp_path):
    prepared_corpus()
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = process(command, stdout=pipe, cwd=tmp_path)
        told = done.communicate(timeout=300)[1]
    assert b"Traceback" not in told and done.returncode in (2, 141)
    begun = process(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    time.sleep(0.5)
    begun.send_signal(signal.SIGINT)
    told = begun.communicate(timeout=300)[1]
    assert begun.returncode in (0, 2, 130, -signal.SIGINT)  # the last: before Python began
