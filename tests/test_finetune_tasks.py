"""Each task as a user runs it: train, evaluate, predict; and what only some tasks have."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nanolm.errors import UserError
from tests.elastic import command_on_ranks
from tests.finetuned import (
    QUIET,
    assert_two_ranks_equal_one,
    checkpoint,
    command,
    finetune,
    table,
)
from tests.test_objectives_tasks import EXTRA, RECORDS

STEPS = ("--train.steps=3", "--train.global_batch=5", "--data.row_length=48", "--eval.batch=4")
LINES = {
    "regress": ("the file\tthe list", "score"),
    "tag": ("the parser reads", "tags"),
    "read": ("the list\tIn 4 the list stands the answer 16, of names.", "answer"),
    "choose": ("the file\tthe list\tthe names\tall", "choice"),
    "choose_dual": ("the file\tthe list\tthe names\tall", "choice"),
    "choose_lm": ("the file\tthe list\tthe names\tall", "choice"),
    "embed": ("the file", "embedding"),
    "write": ("the file", "text"),
    "prompt": ("the file", "label"),
}


@pytest.mark.parametrize(("task", "base"), [(t, "clm" if t == "write" else "mlm") for t in LINES])
def test_train_evaluate_predict(task, base, tmp_path, monkeypatch):
    for split in ("train", "val", "test"):
        table(tmp_path / "data", split, RECORDS[task])
    run = tmp_path / "run"
    options = [f"--objective.{key}={json.dumps(v)}" for key, v in EXTRA.get(task, {}).items()]
    options = [word.replace('="', "=").removesuffix('"') for word in options]
    limit = ["--objective.max_new_tokens=4"] if task == "write" else []
    words = (f"--objective.name={task}", *STEPS, *options, *limit)
    summary = finetune(checkpoint(base), tmp_path / "data", run, *words)
    assert summary["metric"] in summary["val"] and summary["steps"] == 3
    report = tmp_path / "report.json"
    command("evaluate", str(run), f"--json={report}")
    figures = json.loads(report.read_text())
    assert figures["rows"] == 12 and summary["metric"] in figures
    # The same records; evaluate opens the best checkpoint, which need not be the last one.
    assert figures[summary["metric"]] == pytest.approx(summary["best_val"], abs=1e-5)
    line, key = LINES[task]
    lines_file = tmp_path / "lines.txt"
    lines_file.write_text(line + "\n")
    with lines_file.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        (printed,) = command("predict", str(run)).splitlines()
    assert key in json.loads(printed)
    assert (run / "MODEL.md").is_file()


def test_in_batch_negatives_of_two_ranks_equal_one(tmp_path):
    for split in ("train", "val"):
        table(tmp_path / "data", split, RECORDS["embed"])
    base = checkpoint("mlm")
    words = ("--objective.name=embed", *STEPS, "--optim.name=sgd", "--optim.lr=0.1")
    words += ("--objective.width=8",)
    finetune(base, tmp_path / "data", tmp_path / "one", *words)
    argv = [
        f"--init_from={base}",
        f"--data.path={tmp_path / 'data'}",
        f"--run.dir={tmp_path / 'two'}",
    ]
    command_on_ranks(tmp_path / "logs", 2, "finetune", *argv, *QUIET, *words)
    assert_two_ranks_equal_one(tmp_path, 3)
    with pytest.raises(UserError, match="compares all rows of a step"):
        micro = ("--train.micro_batch=2",)
        finetune(base, tmp_path / "data", tmp_path / "three", *words, *micro)


def test_tasks_refuse_what_they_cannot_do(tmp_path):
    table(tmp_path / "data", "train", RECORDS["write"] * 4)
    words = ("--objective.name=write", *STEPS, "--data.val_fraction=0.4")
    with pytest.raises(UserError, match="trains decoder or encoder_decoder trunks"):
        finetune(checkpoint("mlm"), tmp_path / "data", tmp_path / "run", *words)
    table(tmp_path / "cloze", "train", RECORDS["prompt"] * 4)
    options = ("--objective.name=prompt", '--objective.words={"yes": list, "no": file}')
    fresh = ("--objective.transform=false", "--data.val_fraction=0.4")
    with pytest.raises(UserError, match="no vocabulary head of this shape"):
        finetune(checkpoint("mlm"), tmp_path / "cloze", tmp_path / "run", *options, *STEPS, *fresh)


def test_a_cloze_needs_no_training(tmp_path):
    for split in ("train", "val", "test"):
        table(tmp_path / "data", split, RECORDS["prompt"])
    words = ("--objective.name=prompt", '--objective.words={"yes": list, "no": file}', *STEPS)
    summary = finetune(
        checkpoint("mlm"), tmp_path / "data", tmp_path / "run", *words, "--train.steps=0"
    )
    assert summary["steps"] == 0 and 0 <= summary["best_val"] <= 1
    command("evaluate", str(tmp_path / "run"))
    base = load_file(next(checkpoint("mlm").glob("checkpoints/step-*/model.safetensors")))
    mine = load_file(tmp_path / "run/checkpoints/step-00000000/model.safetensors")
    assert all(torch.equal(mine[name], base[name]) for name in base)


def test_an_adapter_goes_with_any_task(tmp_path):
    for split in ("train", "val", "test"):
        table(tmp_path / "data", split, RECORDS["classify"])
    run = tmp_path / "run"
    summary = finetune(checkpoint("mlm"), tmp_path / "data", run, *STEPS, "--peft.name=lora")
    assert summary["trained_params"] < summary["params"] / 3
    command("evaluate", str(run))
    figures = json.loads((run / "evaluation" / "test.json").read_text())["figures"]
    assert figures["accuracy"] == pytest.approx(summary["val"]["accuracy"])
