"""Every kind of folder that nanolm writes, each made once in a session of tests, and command lines
called in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

from nanolm import cli
from tests.finetuned import QUIET, checkpoint, finetune, table
from tests.prepared import TRUNKS, prepared_corpus, train
from tests.test_objectives_tasks import EXTRA, RECORDS

SHORT = ("--train.steps=1", "--train.global_batch=4", "--data.row_length=48", "--eval.batch=4")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command line came to: a status, or the traceback of what escaped."""

    status: int | str
    out: str
    err: str

    @property
    def passes(self) -> bool:
        """Whether it is an answer or one sentence."""
        told = [line for line in self.err.splitlines() if line.startswith("nanolm: ")]
        if self.status == 2:
            return len(told) == 1 and self.err.endswith(told[0] + "\n")
        return self.status == 0 and not told


def call(argv: list[str], stdin: bytes = b"") -> Answer:
    """A command line in this process, with streams as a terminal in UTF-8 gives them."""
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        for name in ("stdout", "stderr")
    }
    streams["stdin"] = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    status: int | str = 0
    with mock.patch.multiple(sys, **streams):
        try:
            cli.main(argv)
        except SystemExit as end:
            status = end.code if isinstance(end.code, (int, str)) else 0
        except BaseException:  # noqa: BLE001 (what escapes is what the walk looks for)
            status = traceback.format_exc()
    out, err = (
        streams[name].buffer.getvalue().decode(errors="replace") for name in ("stdout", "stderr")
    )
    return Answer(status, out, err)


@functools.cache
def scratch() -> pathlib.Path:
    """The folder of this session's runs."""
    return pathlib.Path(tempfile.mkdtemp(prefix="nanolm-walk-"))


# Kinds of run, each made once.


@functools.cache
def pretrained(objective: str) -> pathlib.Path:
    """A pretrained run of two steps: a decoder, an encoder, an encoder-decoder or two streams."""
    trunk = TRUNKS.get(objective, "decoder")
    run = scratch() / objective
    positions = "relative" if trunk == "two_stream" else "rotary"
    words = ("--train.steps=2", "--schedule.warmup=0", f"--model.positions.name={positions}")
    with contextlib.redirect_stdout(io.StringIO()):
        train(run, f"--objective.name={objective}", f"--model.trunk={trunk}", *words)
    return run


@functools.cache
def like_gpt2() -> pathlib.Path:
    """A run of one step whose model has the shape of GPT-2."""
    with contextlib.redirect_stdout(io.StringIO()):
        train(scratch() / "gpt2", "--train.steps=1", "--model.feed_forward=gelu_tanh")
    return scratch() / "gpt2"


@functools.cache
def data_of(task: str) -> pathlib.Path:
    """The tables of a task."""
    for split in ("train", "val", "test"):
        table(scratch() / "data" / task, split, RECORDS[task])
    return scratch() / "data" / task


def words_of(task: str) -> list[str]:
    """What a run of the task is told, beside base, data and folder."""
    extra = EXTRA.get(task, {}) | ({"max_new_tokens": 4} if task == "write" else {})
    options = [f"--objective.{key}={_word(value)}" for key, value in extra.items()]
    return [f"--objective.name={task}", *SHORT, *options]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@functools.cache
def tuned(task: str, *more: str) -> pathlib.Path:
    """A fine-tuned run of one step."""
    run = scratch() / "-".join([task, *(word.strip("-").replace("=", "-") for word in more)])
    base = checkpoint("clm" if task == "write" else "mlm")
    finetune(base, data_of(task), run, *words_of(task), *more)
    return run


@functools.cache
def folds() -> pathlib.Path:
    """The folder above the runs of two folds."""
    table(scratch() / "folded", "train", RECORDS["classify"] * 2)
    run = scratch() / "folds"
    words = [f"--init_from={checkpoint('mlm')}", f"--data.path={scratch() / 'folded'}"]
    done = call(["finetune", *words, f"--run.dir={run}", *QUIET, *SHORT, "--data.folds=2"])
    assert done.status == 0, done
    return run


@functools.cache
def several() -> pathlib.Path:
    """A run of two tasks."""
    parts = {
        name: {"objective": {"name": name}, "data": {"path": str(data_of(name))}}
        for name in ("classify", "tag")
    }
    run, words = scratch() / "multi", ("--data.path=null", f"--objective.tasks={json.dumps(parts)}")
    finetune(checkpoint("mlm"), "unused", run, "--objective.name=multi", *SHORT, *words)
    return run


@functools.cache
def written(command: str, run: pathlib.Path, *more: str) -> pathlib.Path:
    """What `merge` or `export` writes of a run."""
    out = scratch() / f"{command}-{run.name}{'-'.join(more)}"
    done = call([command, str(run), f"--out={out}", *more])
    assert done.status == 0, done
    return out


@functools.cache
def studied() -> pathlib.Path:
    """The folder of a study that was run."""
    folder = scratch() / "study"
    folder.mkdir()
    (folder / "study.yaml").write_text(
        f"name: tiny\npaths: {{encoder: {checkpoint('mlm')}}}\n"
        f"overrides: {{init_from: '{{encoder}}', train.steps: 1}}\n"
        f"out: {folder / 'out'}\nrows: [{{name: kinds, metric: accuracy, overrides: "
        f"{{data.path: {data_of('classify')}}}}}]\nvariants: {{pretrained: {{}}}}\n"
    )
    done = call(["study", str(folder / "study.yaml")])
    assert done.status == 0, done
    return folder / "out"


TASKS = [task for task in RECORDS if task != "similar"]
KINDS: dict[str, Callable[[], pathlib.Path]] = {
    "clm": lambda: pretrained("clm"),
    "mlm": lambda: pretrained("mlm"),
    "span": lambda: pretrained("span"),
    **{task: functools.partial(tuned, task) for task in TASKS},
    "multi": several,
    "adapter": lambda: tuned("classify", "--peft.name=lora"),
    "adapter of a writer": lambda: tuned("write", "--peft.name=lora"),
    "merged": lambda: written("merge", tuned("classify", "--peft.name=lora")),
    "export": lambda: written("export", pretrained("clm")),
    "export of a task": lambda: written("export", tuned("classify")),
    "transformers": lambda: written("export", like_gpt2(), "--format=transformers"),
    "folds": folds,
    "study": studied,
    "prepared": prepared_corpus,
}
"""Every kind of folder that nanolm writes: name -> where one of this kind lies."""
