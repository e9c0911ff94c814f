"""The walk: every command × every kind of run × every way in which a value can be odd.

A cell is one command line. It passes when the command answers (status 0) or refuses in one sentence
(status 2), and never with a traceback. Commands and options are those of the command line's own
registry and schemas, so a new command or option is walked without a word here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import os
import pathlib
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

from nanolm import cli
from nanolm.config.choices import choose
from nanolm.config.load import leaf_kinds, split_words
from nanolm.config.schema import Config
from nanolm.config.typed import is_union
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.study.config import StudyConfig
from tests.finetuned import QUIET, checkpoint
from tests.kinds_of_run import KINDS, SHORT, Answer, call, data_of, scratch, studied, tuned
from tests.prepared import SMALL, prepared_corpus

ROOT = pathlib.Path(__file__).parent.parent
MEASURED = ("parity", "kernels check", "kernels bench", "kernels memory", "kernels compile")
MEASURED += ("kernels doctor", *(name for name in cli.COMMANDS if name.startswith("bench")))
"""Commands that work for long: the walk reads their command lines and leaves out the work."""


# What stands on a command line that works, and what a value can be.

FITTING = {"fill": "mlm", "merge": "adapter", "explain": "classify", "predict": "classify"}
FITTING |= {"compare": "evaluated", "train": "clm", "import": "transformers", "doctor": "clm"}
"""The kind of run with which a command works best; clm where none is named."""


@functools.cache
def evaluated() -> pathlib.Path:
    """A fine-tuned run with an evaluation of its test split."""
    done = call(["evaluate", str(tuned("classify"))])
    assert done.status == 0, done
    return tuned("classify")


@functools.cache
def texts() -> pathlib.Path:
    """A folder with one text."""
    folder = scratch() / "texts"
    folder.mkdir()
    text = "".join(f"One text, number {n}.\n\nAnother one, with {n} words.\n\n" for n in range(40))
    (folder / "a.txt").write_text(text)
    return folder


def of_corpus() -> list[str]:
    """The options of a small training run."""
    small = [word for word in SMALL if not word.startswith("--data.row_length")]
    corpus = f"--data.path={prepared_corpus()}"
    return [*small, "--data.row_length=16", *QUIET, "--train.steps=1", corpus]


# Each is called when its command is walked and not before: some make a run of their own first.
ON_A_RUN: dict[str, Callable[[str], list[str]]] = {
    "predict": lambda run: [str(data_of("classify") / "test.jsonl")],
    "explain": lambda run: ["the file", "--steps=1", "--most_steps=1"],
    "merge": lambda run: ["--out=out"],
    "export": lambda run: ["--out=out"],
    "import": lambda run: ["out"],
    "evaluate": lambda run: ["--batches=1"],
    "compare": lambda run: [run],
    "generate": lambda run: ["--prompt=def", "--max_tokens=2"],
    "fill": lambda run: ["a <mask> b"],
    "doctor": lambda run: ["1"],
    "plot": lambda run: ["--out=plot.png"],
    "walk": lambda run: [],
}
"""Command whose first word is a run -> the words behind the run."""
ELSEWHERE: dict[str, Callable[[str], list[str]]] = {
    "prepare": lambda run: [
        str(texts()),
        "--out=out",
        f"--tokenizer={prepared_corpus() / 'tokenizer.model'}",
        "--workers=1",
        "--txt_documents=paragraph",
    ],
    "data inspect": lambda run: [str(prepared_corpus())],
    "data verify": lambda run: [str(prepared_corpus())],
    "train": lambda run: [*of_corpus(), "--run.dir=out", "--eval.batches=1", "--schedule.warmup=0"],
    "profile": lambda run: [*of_corpus(), "--run.dir=out"],
    "finetune": lambda run: [
        f"--init_from={checkpoint('mlm')}",
        f"--data.path={data_of('classify')}",
        "--run.dir=out",
        *QUIET,
        *SHORT,
    ],
    "study": lambda run: [str(studied().parent / "study.yaml")],
    "estimate": lambda run: [str(ROOT / "configs/pretrain/demo_clm.yaml")],
    "runs": lambda run: [str(pathlib.Path(run).parent if run else run)],
    "figures": lambda run: ["--out=out"],
    "bench prepare": lambda run: [str(texts())],
    "bench data": lambda run: [str(prepared_corpus())],
}
"""Other commands -> their words."""


def line_of(command: str, run: str) -> list[str]:
    """The words behind a command that works on this run, quickly; it writes to new folders of the
    present one."""
    if command in ON_A_RUN:
        return [run, *ON_A_RUN[command](run)]
    return ELSEWHERE[command](run) if command in ELSEWHERE else []


def schema_of(command: str) -> type:
    """The dataclass whose fields are a command's options."""
    runs = {"train": Config, "profile": Config, "finetune": TaskConfig}
    if command in runs:
        names = {"objective": "classify"} if command == "finetune" else {}
        return choose(names, runs[command])
    module = importlib.import_module(cli.COMMANDS[command][0])
    return StudyConfig if command == "study" else module.Arguments


HUGE = "1" + "0" * 30
ODD = {
    int: ["0", "-1", str(1 << 62), HUGE, f"-{HUGE}", "x", "1.5", ""],
    float: ["nan", "inf", "-1", "0", "1e-38", "1e38", "x", HUGE],
    bool: ["maybe", ""],
    dict: ["{a: 1}", "[1", ""],
    list: ["[]", "[1", "", "x" * 300, "\udcff"],
    str: [
        "",
        "x" * 300,
        "na\udcefve",
        "nowhere/at/all",
        "FILE",
        "FOLDER",
        "/sys/nanolm",
        "~/x",
        "a.odd",
    ],
}
DEVICES = ["gpu", "cuda", "cuda:7", "", "CPU"]


def odd_values(key: str, kind: Any) -> list[str]:
    """Odd words for an option of this kind."""
    if key.rpartition(".")[2] == "device":
        return DEVICES
    parts = [part for part in (typing.get_args(kind) if is_union(kind) else (kind,))]
    values: list[str] = []
    for part in parts:
        while typing.get_origin(part) is typing.Annotated:
            part = typing.get_args(part)[0]
        origin = typing.get_origin(part) or part
        if origin is Literal:
            values += ["x", ""]
        values += ODD.get(list if origin is tuple else origin, [])
    return list(dict.fromkeys(values)) or ["x", ""]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One command line: what is odd about it, and on which kind of run."""

    command: str
    kind: str
    option: str = ""
    value: str = ""

    def __str__(self) -> str:
        shown = self.value if len(self.value) < 40 else f"{self.value[:8]}… ({len(self.value)})"
        odd = f" --{self.option}={shown!a}" if self.option else ""
        return f"{self.command} [{self.kind}]{odd}"


STREAMS = {
    "empty": b"",
    "empty lines": b"\n\n \n",
    "not UTF-8": b"the \xff\xfe file\n\xc3\n",
    "zeros": b"a\0b\n\0\n",
    "long": b"x y " * 30_000 + b"\n",
    "no end of line": b"the file",
    "tabs": b"\t\t\t\t\t\t\n",
    "byte-order mark": "\ufeffthe file\n".encode("utf-16"),
    "numbers": b'1\n-1e999\n{"text": 1}\nnull\n[]\n{"text": null}\n{}\n',
    "half a pair": b'{"text": "\\ud800"}\n',
    "deep": b"[" * 100_000 + b"\n",
}


def cells(kinds: bool = True) -> list[Cell]:
    """All cells: plain ones on every kind, odd options on the fitting kind, and with `kinds` on
    each of those that the command reads, and odd streams into `predict`."""
    found = []
    for command in cli.COMMANDS:
        fits = FITTING.get(command, "clm")
        wherever = list(KINDS) if command in ON_A_RUN else [fits]
        found += [Cell(command, kind) for kind in wherever]
        for key, kind in leaf_kinds(schema_of(command)).items():
            for value, where in itertools.product(odd_values(key, kind), wherever):
                if where == fits or (kinds and key != "json"):
                    found.append(Cell(command, where, key, value))
    found += [Cell("predict", kind, "<", stream) for kind in KINDS for stream in STREAMS]
    return list(dict.fromkeys(found))


def walk(cell: Cell, place: pathlib.Path) -> Answer:
    """The cell, from a new folder `place`, into which what has a relative name is written."""
    place.mkdir()
    (place / "FILE").write_bytes(b"not what you think\n")
    (place / "FOLDER").mkdir()
    kind = evaluated if cell.kind == "evaluated" else KINDS[cell.kind]
    words = line_of(cell.command, str(kind()))
    stdin = b""
    if cell.option == "<":
        words, stdin = words[:1], STREAMS[cell.value]
    elif cell.option:
        words = without(words, cell)
        words.append(f"--{cell.option}={cell.value}")
    with contextlib.chdir(place), spared(cell.command):
        return call([*cell.command.split(), *words], stdin)


def without(words: list[str], cell: Cell) -> list[str]:
    """The words less those that say what the cell says."""
    if cell.command in ("train", "profile", "finetune"):
        return words
    module = importlib.import_module(cli.COMMANDS[cell.command][0])
    positional = list(getattr(module, "POSITIONAL", ()))
    named = split_words(words)
    if cell.option in positional:  # others by name, in its place
        loose = named.pop("", [])
        words = [word for word in words if word.startswith("--")]
        pairs = zip(positional, loose, strict=False)
        words += [f"--{key}={word}" for key, word in pairs if key != cell.option]
    return words


@contextlib.contextmanager
def spared(command: str) -> Iterator[None]:
    """Leaves the work of a command out where it takes long, and a study's processes."""
    module = importlib.import_module(cli.COMMANDS[command][0])
    threads = os.environ.get("OMP_NUM_THREADS")
    with contextlib.ExitStack() as stack:
        if command in MEASURED:
            stack.enter_context(mock.patch.object(module, "run", lambda arguments: None))
        yield
    assert os.environ.get("OMP_NUM_THREADS") == threads
