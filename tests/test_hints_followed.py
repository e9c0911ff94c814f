"""Remedies are followed: each refused command line is mended as its own sentence says, and runs.

A row names what is refused and which options of the sentence are taken up. Their values are those
of the sentence; what it leaves to the user (a word in CAPITALS, or nothing) stands in the row.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shlex
from collections.abc import Callable

import pytest

from tests.finetuned import QUIET, table
from tests.kinds_of_run import (
    call,
    data_of,
    folds,
    pretrained,
    several,
    tuned,
    words_of,
)
from tests.prepared import SMALL, prepared_corpus
from tests.test_objectives_tasks import RECORDS


@dataclasses.dataclass(frozen=True)
class Row:
    """A command line that is refused, and how its sentence is followed.

    `adds`: options that the sentence names, with their value, or None where the sentence gives it.
    `drops`: options that it says to leave out. `runs`: words of the command that it quotes,
    whose placeholders are replaced by `given`. `behind`: what is run in place of the first line.
    """

    words: list[object]
    adds: dict[str, object] = dataclasses.field(default_factory=dict)
    drops: tuple[str, ...] = ()
    runs: str = ""
    given: dict[str, object] = dataclasses.field(default_factory=dict)
    behind: list[object] | None = None


def finetuning(task: str, folder: pathlib.Path, *more: object) -> list[object]:
    """A fine-tuning run of one step on the task's records."""
    words = [f"--init_from={pretrained('clm' if task == 'write' else 'mlm')}"]
    words += [f"--data.path={data_of(task)}", f"--run.dir={folder / 'run'}"]
    return ["finetune", *words, *words_of(task), *QUIET, "--data.row_length=32", *more]


def training(folder: pathlib.Path, *more: object) -> list[object]:
    """A pretraining run of one step."""
    words = [f"--data.path={prepared_corpus()}", f"--run.dir={folder / 'run'}"]
    return ["train", *SMALL, *words, "--train.steps=1", "--schedule.warmup=0", *more]


def preparing(folder: pathlib.Path, source: str, content: str, *more: object) -> list[object]:
    """A preparation of one file with the tokenizer of another corpus."""
    path = folder / "in" / source
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    words = [f"--tokenizer={prepared_corpus() / 'tokenizer.model'}", "--val_fraction=0"]
    return ["prepare", path, f"--out={folder / 'out'}", "--workers=1", *words, *more]


def again(words: list[object]) -> list[object]:
    """The words, after they were run once."""
    assert call(list(map(str, words))).status == 0
    return words


def file_of(task: str) -> pathlib.Path:
    return data_of(task) / "val.jsonl"


def renamed(folder: pathlib.Path) -> pathlib.Path:
    """The records of `classify` with a text column of another name, one of them without a label."""
    rows = [{"body": r["text"], "label": r["label"]} for r in RECORDS["classify"]]
    return table(folder, "mine", rows)


def without_label(folder: pathlib.Path) -> pathlib.Path:
    return table(folder, "mine", [*RECORDS["classify"] * 2, {"text": "no label", "label": None}])


def folder_of(path: pathlib.Path) -> pathlib.Path:
    path.mkdir()
    (path / "kept").write_text("x")
    return path


LORA = functools.partial(tuned, "classify", "--peft.name=lora")
CLASSIFIER = functools.partial(tuned, "classify")
RECORDS_OF_TEXT = json.dumps({"body": "some text"}) + "\n"

ROWS: dict[str, Callable[[pathlib.Path], Row]] = {
    "a run that is there": lambda f: Row(again(training(f)), {"--resume": None}),
    "another folder": lambda f: Row(again(training(f)), {"run.dir": f / "new"}),
    "a table of several tasks": lambda f: Row(
        ["evaluate", several(), f"--data={file_of('classify')}"], {"--task": "classify"}
    ),
    "no task named": lambda f: Row(["predict", several(), file_of("classify")], {"--task": None}),
    "a task of one": lambda f: Row(
        ["predict", CLASSIFIER(), file_of("classify"), "--task=x"], drops=("--task",)
    ),
    "a task of a pretrained run": lambda f: Row(
        ["evaluate", pretrained("mlm"), "--task=x"], drops=("--task",)
    ),
    "columns of a corpus": lambda f: Row(
        ["evaluate", pretrained("mlm"), "--columns={text: x}"], drops=("--columns",)
    ),
    "columns of no data": lambda f: Row(
        ["evaluate", CLASSIFIER(), "--columns={text: body}"], {"--data": renamed(f)}
    ),
    "a column of other data": lambda f: Row(
        ["evaluate", CLASSIFIER(), f"--data={renamed(f)}"],
        {"--columns": None},
        given={"NAME": "body"},
    ),
    "a column of the train file": lambda f: Row(
        finetuning("classify", f, f"--data.train={renamed(f)}", f"--data.val={renamed(f)}"),
        {"--data.columns": None},
        given={"NAME": "body"},
    ),
    "a row without a label": lambda f: Row(
        finetuning("classify", f, f"--data.train={without_label(f)}"), {"--data.bad_rows": None}
    ),
    "no test split": lambda f: Row(
        ["evaluate", folds() / "fold-0", "--split=test"],
        {"--data": file_of("classify")},
    ),
    "a figure that there is not": lambda f: Row(
        finetuning("classify", f, "--eval.metric=f1"), {"eval.metric": "macro_f1"}
    ),
    "too long an answer": lambda f: Row(
        finetuning("write", f, "--objective.max_new_tokens=500"),
        {"objective.max_new_tokens": 112},
    ),
    "nothing to fine-tune": lambda f: Row(
        [w for w in finetuning("classify", f) if "init_from" not in str(w)],
        {"init_from": pretrained("mlm")},
    ),
    "an adapter as base": lambda f: Row(
        [w for w in finetuning("classify", f) if "init_from" not in str(w)]
        + [f"--init_from={LORA()}"],
        runs="merge",
        given={"FOLDER": f / "merged"},
        behind=[
            *(w for w in finetuning("classify", f) if "init_from" not in str(w)),
            f"--init_from={f / 'merged'}",
        ],
    ),
    "an adapter of nothing": lambda f: Row(
        training(f, "--peft.name=lora", "--model.positions.name=rotary"),
        {"--init_from": pretrained("clm")},
    ),
    "pretraining that is asked of fine-tuning": lambda f: Row(
        finetuning("classify", f, "--objective.name=clm"), {"objective": "classify"}
    ),
    "a place that is taken (export)": lambda f: Row(
        ["export", pretrained("clm"), f"--out={folder_of(f / 'x')}"], {"--out": f / "y"}
    ),
    "a place that is taken (merge)": lambda f: Row(
        ["merge", LORA(), f"--out={folder_of(f / 'x')}"], {"--out": f / "y"}
    ),
    "a place that is taken (prepare)": lambda f: Row(
        preparing(f, "a.txt", "some words\n" * 40, f"--out={folder_of(f / 'x')}"),
        {"--out": f / "y"},
    ),
    "an export of an adapter": lambda f: Row(
        ["export", LORA(), f"--out={f / 'x'}"],
        runs="merge",
        given={"FOLDER": f / "m"},
        behind=["export", f / "m", f"--out={f / 'x'}"],
    ),
    "a model that transformers has not": lambda f: Row(
        ["export", pretrained("clm"), "--format=transformers", f"--out={f / 'x'}"],
        {"--format": None},
    ),
    "beams and stops": lambda f: Row(
        ["generate", pretrained("clm"), "--beams=2", "--stop=[a]", "--max_tokens=3"],
        drops=("--stop",),
    ),
    "a classifier that should write": lambda f: Row(
        ["generate", CLASSIFIER()],
        runs="predict",
        behind=["predict", CLASSIFIER(), file_of("classify")],
    ),
    "an encoder that should write": lambda f: Row(
        ["generate", pretrained("mlm")],
        runs="fill",
        behind=["fill", pretrained("mlm"), "--text=a <mask> c"],
    ),
    "a decoder that should fill": lambda f: Row(
        ["fill", pretrained("clm"), "--text=a <mask> c"],
        runs="generate",
        behind=["generate", pretrained("clm"), "--max_tokens=3"],
    ),
    "a pretrained run that should predict": lambda f: Row(
        ["predict", pretrained("clm"), file_of("classify")],
        runs="generate",
        behind=["generate", pretrained("clm"), "--max_tokens=3"],
    ),
    "a text without a gap": lambda f: Row(
        ["fill", pretrained("mlm"), "--text=a b"], {"--text": "a <mask> b"}
    ),
    "an ensemble of adapters": lambda f: Row(
        ["evaluate", LORA(), f"--ensemble=[{LORA()}]", "--average=weights"],
        {"--average": "logits"},
    ),
    "an ensemble of writers": lambda f: Row(
        ["evaluate", tuned("write"), f"--ensemble=[{tuned('write')}]"], {"--average": None}
    ),
    "no runs here": lambda f: Row(
        ["runs", f"--folder={f}"], {"--folder": pretrained("clm").parent}
    ),
    "a label that there is not": lambda f: Row(
        ["explain", CLASSIFIER(), "the file", "--target=x", *map(str, quick(f))], {"--target": "a"}
    ),
    "a field that there is not": lambda f: Row(
        preparing(f, "a.jsonl", RECORDS_OF_TEXT * 40), {"--text_field": None}
    ),
    "JSON that is broken": lambda f: Row(
        [
            *preparing(f, "a.json", '[{"text": "some words"}, {"text": "more"}, {x'),
            preparing(f, "b.txt", "some words\n" * 40)[1],
        ],
        {"--exclude": None},
    ),
    "a CSV": lambda f: Row(
        preparing(f, "a.csv", "text,label\n" + "Some words.,a\nOther words here.,b\n" * 20),
        {"table:": None},
        given={"COLUMN": "text"},
    ),
    "a vocabulary beside a tokenizer": lambda f: Row(
        preparing(f, "a.txt", "some words\n" * 40, "--vocab_size=700"), drops=("vocab_size",)
    ),
    "a row that predicts nothing (walk)": lambda f: Row(
        ["walk", pretrained("clm"), "--position=100000", "--layer=0"],
        {"--position": None},
    ),
}


def quick(folder: pathlib.Path) -> list[str]:
    return ["--steps=4", "--tolerance=0.9", f"--out={folder / 'explained'}"]


def told(sentence: str, option: str, given: dict[str, object]) -> str:
    """The value that a sentence gives to an option, its placeholders replaced."""
    pattern = rf"{re.escape(option)}(?: to at most|[ =])? ?('[^']*'|[\w./-]+)"
    if option == "table:":
        pattern = r"(table:\S+)"
    elif option in ("--text_field", "--position"):  # "choose --text_field from a, b"
        pattern = rf"{option}(?: from| \d+ of this row predicts nothing; these do:) ([\w./-]+)"
    value = re.search(pattern, sentence)[1].strip("'").rstrip(".,;")
    for placeholder, word in given.items():
        value = value.replace(placeholder, str(word))
    return value


def mended(row: Row, sentence: str) -> list[str]:
    """The row's words as its sentence says."""
    words = list(map(str, row.words))
    for option in row.drops:
        assert option in sentence, sentence
        key = option.removeprefix("--")
        words = [word for word in words if not word.startswith(f"--{key}=")]
    for option, value in row.adds.items():
        assert option in sentence, sentence
        value = told(sentence, option, row.given) if value is None else value
        if option == "table:":
            words[1] = str(value).replace("FILE", words[1])
            continue
        key = option.removeprefix("--")
        key = "objective.name" if key == "objective" else key
        words = [word for word in words if not word.startswith(f"--{key}=")]
        words.append(f"--{key}={value}")
    return words


def follow(row: Row) -> None:
    """Refuses the row's words, does what the sentence says, and runs what it leads to."""
    refused = call(list(map(str, row.words)))
    assert refused.status == 2 and refused.passes, refused
    sentence = refused.err.removeprefix("nanolm: ").rstrip("\n")
    if row.runs:
        quoted = re.findall(rf"`nanolm ({row.runs}[^`]*)`", sentence)
        assert quoted, sentence
        if row.given:
            words = [str(row.given.get(word, word)) for word in shlex.split(quoted[0])]
            assert call(words).status == 0
    behind = mended(row, sentence) if row.behind is None else list(map(str, row.behind))
    done = call(behind)
    assert done.status == 0 and done.passes, (sentence, done)


@pytest.mark.parametrize("name", ROWS)
def test_a_remedy_that_is_followed_works(name, tmp_path):
    follow(ROWS[name](tmp_path))


def test_there_are_many_rows():
    assert len(ROWS) >= 35
