"""Fine-tuning as a whole: from a checkpoint and a table to a model that predicts."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nanolm.checkpoint.checkpoints import Checkpoints
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.finetune.run import main
from nanolm.training.throughput import TIMING
from nanolm.training.trainer import Trainer
from tests.finetuned import QUIET, checkpoint, command, config, finetune, questions, table
from tests.test_train_command import ROOT
from tests.tiny_run import in_ranks

SHORT = ("--optim.lr=3e-3", "--train.global_batch=12", "--objective.head_dropout=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    table(folder, "train", questions(120))
    table(folder, "val", questions(31, 1000))
    table(folder, "test", questions(30, 2000))
    return folder


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    """An encoder that was fine-tuned for two epochs."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    finetune(checkpoint("mlm"), data, run, *SHORT, "--train.epochs=2")
    return run


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_finetune_evaluate_predict(objective, data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    summary = finetune(checkpoint(objective), data, run, *SHORT, "--train.epochs=4")
    assert summary["steps"] == 40 and summary["metric"] == "accuracy"
    assert summary["best_val"] > 0.9 and summary["best_step"] % 10 == 0
    report = tmp_path / "report.json"
    printed = command("evaluate", str(run), f"--json={report}")
    figures = json.loads(report.read_text())
    assert figures["split"] == "test" and figures["rows"] == 30 and figures["accuracy"] > 0.9
    assert "macro avg" in printed and "macro_f1" in printed
    kept = json.loads((run / "evaluation" / "test.json").read_text())
    assert kept["labels"] == ["error", "file", "list"]
    assert sum(map(sum, kept["confusion"])) == 30
    assert (run / "evaluation" / "test_confusion.png").stat().st_size > 1000
    card = (run / "MODEL.md").read_text()
    assert "Labels: error, file, list" in card and "| test |" in card
    out = tmp_path / "out.jsonl"
    command("predict", str(run), str(data / "test.jsonl"), f"--out={out}")
    from_file = [json.loads(line) for line in out.read_text().splitlines()]
    stored = (run / "evaluation" / "test_predictions.jsonl").read_text().splitlines()
    for mine, theirs in zip(from_file, map(json.loads, stored), strict=True):
        assert mine["label"] == theirs["label"]
        assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-5)
    asked = "open a file\n\nraise an error\n" + '{"text": "append to the list"}\n'
    answers = list(map(json.loads, command("predict", str(run), stdin=asked).splitlines()))
    assert [a.get("label") for a in answers] == ["file", None, "error", "list"]
    assert answers[1] == {"error": "the line is empty"}


def torchrun(ranks, words):
    command_line = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    job = subprocess.run(
        [sys.executable, *command_line, "-m", "nanolm.finetune", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert job.returncode == 0, job.stdout + job.stderr


@pytest.mark.slow
def test_two_ranks_equal_one_with_uneven_shares(data, tmp_path):
    base = checkpoint("mlm")
    steps = ("--train.steps=7", "--train.global_batch=7", "--train.micro_batch=2")
    steps += (
        "--optim.name=sgd",
        "--optim.lr=0.1",
    )  # Adam magnifies rounding where gradients vanish
    finetune(base, data, tmp_path / "one", *SHORT, *steps)
    words = [f"--init_from={base}", f"--data.path={data}", f"--run.dir={tmp_path / 'two'}"]
    torchrun(2, [*words, *QUIET, *SHORT, *steps])
    for left, right in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert left["kind"] == right["kind"]
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["accuracy"] == pytest.approx(right["accuracy"], abs=1e-9)
    one, two = (tmp_path / run / "checkpoints/step-00000007" for run in ("one", "two"))
    for name, tensor in load_file(one / "model.safetensors").items():
        found = load_file(two / "model.safetensors")[name]
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5)


def finetune_and_be_killed(world, argv):
    """Dies after nine steps, in a process of its own."""
    old = Trainer.step

    def step(self, batches):
        if self.state.done == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return old(self, batches)

    Trainer.step = step
    main(argv)


def test_a_killed_run_resumes_bit_for_bit(data, tmp_path):
    base = checkpoint("mlm")
    words = (*SHORT, "--objective.head_dropout=0.1", "--train.steps=12", "--eval.every=4")
    finetune(base, data, tmp_path / "whole", *words)
    broken = tmp_path / "broken"
    argv = [f"--init_from={base}", f"--data.path={data}", f"--run.dir={broken}", *QUIET, *words]
    in_ranks(1, finetune_and_be_killed, argv, kill=True)
    assert Checkpoints(broken, World()).steps()[-1] == 8
    finetune(base, data, broken, *words, "--resume=auto")
    plain = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in lines(run)]
        for run in (tmp_path / "whole", broken)
    ]
    assert plain[0] == plain[1]
    for part in ("model", "optimizer"):
        left, right = (
            load_file(run / f"checkpoints/step-00000012/{part}.safetensors")
            for run in (tmp_path / "whole", broken)
        )
        assert all(torch.equal(left[name], right[name]) for name in left | right)


def test_it_says_which_heads_are_fresh_and_which_unused(data, tmp_path, capsys):
    from nanolm.finetune.run import run_finetune

    base = checkpoint("mlm")
    run_finetune(config(base, data, tmp_path / "a", *SHORT, "--train.steps=1"))
    printed = capsys.readouterr().out
    assert "fresh heads: heads.classify; unused of the checkpoint: heads.lm" in printed
    # What was fine-tuned can be fine-tuned again, and its head fits.
    again = config(tmp_path / "a", data, tmp_path / "b", *SHORT, "--train.steps=1")
    run_finetune(again)
    printed = capsys.readouterr().out
    assert "weights from" in printed and "fresh" not in printed and "unused" not in printed
    random = config(base, data, tmp_path / "c", "--weights=random", *SHORT, "--train.steps=1")
    run_finetune(random)
    assert "random weights in the shape of" in capsys.readouterr().out


def test_truncation_and_skipped_rows_are_counted(tmp_path, capsys):
    from nanolm.finetune.run import run_finetune

    records = questions(30)
    records[4]["text"], records[7]["text"] = "  ", "word " * 100
    table(tmp_path / "data", "train", records)
    words = (*SHORT, "--train.steps=1", "--data.val_fraction=0.3", "--data.row_length=24")
    with pytest.raises(UserError, match=r"row 5: text is empty; mend it"):
        finetune(checkpoint("mlm"), tmp_path / "data", tmp_path / "a", *words)
    assert not (tmp_path / "a").exists()
    skip = config(
        checkpoint("mlm"), tmp_path / "data", tmp_path / "b", *words, "--data.bad_rows=skip"
    )
    run_finetune(skip)
    printed = capsys.readouterr().out
    assert "left out 1 of" in printed and "because text is empty (row 5)" in printed
    assert "were cut to data.row_length=24 tokens" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.columns={text: question}"], "column question, but .* has text, label"),
        (["--objective.name=mlm"], "continue pretraining with `nanolm train --init_from`"),
        (["--data.row_length=4096"], "exceeds model.max_length=128"),
        (["--model.d_model=64"], "another model shape"),
        (["--init_from=null"], "nothing to fine-tune: set init_from"),
        (["--init_from=/nowhere"], "no such folder"),
        (["--data.path=/nowhere"], "neither a folder nor a file"),
        (["--objective.labels=[list, file]"], "label 'error' is not in the label set list, file"),
        (["--eval.metric=f2"], "eval.metric=f2 is no figure of this task; there are"),
        (["--objective.pooling=cls"], "cls cannot go with a decoder"),
        (["--objective.labell=x"], "objective.labell: there is no such key"),
        (["--augment.synonyms=/nowhere"], "augment.synonyms: there is no file /nowhere"),
        (["--augment.opposites=x.tsv"], "candidates or objective=classify with two labels"),
        (["--augment.opposite_rate=1"], "augment.opposite_rate=1.0 must lie in"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, data, tmp_path):
    base = checkpoint("clm" if "cls" in words[0] else "mlm")
    with pytest.raises(UserError, match=sentence):
        finetune(base, data, tmp_path / "run", *words, "--train.steps=1", "--optim.lr=1e-2")


def test_an_unknown_test_label_and_other_data_are_refused(tuned, data, tmp_path):
    strange = table(
        tmp_path, "strange", [{"text": "a", "label": "list"}, {"text": "b", "label": "x"}]
    )
    with pytest.raises(UserError, match=r"strange.jsonl row 2: label 'x' is not in the label set"):
        command("evaluate", str(tuned), f"--data={strange}")
    other = table(tmp_path, "other", [{"body": "a", "label": "list"}])
    with pytest.raises(UserError, match="no column text; it has body, label"):
        command("predict", str(tuned), str(other))
    with pytest.raises(UserError, match="was pretrained, not fine-tuned"):
        command("predict", str(checkpoint("mlm")), str(other))
    moved = tmp_path / "moved"
    table(moved, "train", questions(120, 5))
    table(moved, "val", questions(31, 1000))
    with pytest.raises(UserError, match="another data_hash"):
        finetune(checkpoint("mlm"), moved, tuned, *SHORT, "--train.epochs=2", "--resume=auto")


def test_pretraining_refuses_a_task():
    from nanolm.config.load import load_config
    from nanolm.pretrain import run_train
    from tests.prepared import prepared_corpus

    argv = ["--objective.name=classify", f"--data.path={prepared_corpus()}", "--model.d_model=32"]
    with pytest.raises(UserError, match="use `nanolm finetune`"):
        run_train(load_config([*argv, "--model.n_heads=4"]))
