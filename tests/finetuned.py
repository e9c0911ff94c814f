"""Tiny pretrained checkpoints and tiny labelled tables for the tests of fine-tuning."""

import contextlib
import functools
import io
import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from nanolm import cli
from nanolm.finetune.run import load_task_config, run_finetune
from tests.prepared import TRUNKS, once, train

QUIET = ["--run.wandb.mode=disabled", "--run.threads=1", "--run.device=cpu", "--run.log_every=1"]


@functools.cache
def checkpoint(objective: str = "mlm", segments: int = 0) -> pathlib.Path:
    """A run of a few steps on the trunk that the objective trains."""
    words = (
        f"--objective.name={objective}",
        f"--model.trunk={TRUNKS.get(objective, 'decoder')}",
        f"--model.n_segments={segments}",
        "--model.positions.name=rotary",
        "--data.row_length=64",
        "--train.steps=6",
        "--schedule.warmup=0",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return once(f"base-{objective}-{segments}", lambda folder: train(folder, *words))


def table(folder: pathlib.Path, name: str, records: list[dict]) -> pathlib.Path:
    """A JSONL file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(base: pathlib.Path, data: pathlib.Path, run: pathlib.Path, *words: str):
    """The config of a fine-tuning run."""
    argv = [f"--init_from={base}", f"--data.path={data}", f"--run.dir={run}", *QUIET, *words]
    return load_task_config(argv)


def finetune(base, data, run, *words: str) -> dict:
    """A fine-tuning run in this process; returns its summary."""
    with contextlib.redirect_stdout(io.StringIO()):
        return run_finetune(config(base, data, run, *words))


def command(*words: str, stdin: str | None = None) -> str:
    """What a command prints; `stdin` is what it finds on the standard input."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        if stdin is not None:
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        cli.run(list(words))
    return out.getvalue()


def questions(n: int, start: int = 0) -> list[dict]:
    """Short uneven texts whose label is the keyword that they hold."""
    words = {"list": "append to the list", "file": "open a file", "error": "raise an error"}
    records = []
    for i in range(start, start + n):
        label = ["list", "file", "error"][i % 3]
        text = f"{words[label]} " * (1 + i % 3) + "and return" * (i % 2)
        records.append({"text": text, "label": label})
    return records


def assert_two_ranks_equal_one(folder, steps, *keys):
    """The runs `one` and `two` logged the same figures and ended with the same weights."""
    runs = [folder / "one", folder / "two"]
    one, two = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    )
    for left, right in zip(one, two, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        for key in keys if left["kind"] == "train" else ():
            assert left[key] == pytest.approx(right[key], abs=1e-5)
    one, two = (load_file(run / f"checkpoints/step-{steps:08d}/model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
