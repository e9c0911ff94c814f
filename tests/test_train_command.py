"""Whole runs: text, shards, `nanolm train` and `torchrun train.py`, signals, `nanolm evaluate`."""

import contextlib
import io
import json
import pathlib
import signal
import subprocess
import sys
import sysconfig
import time

import pytest

from nanolm import cli
from nanolm.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Forty modules of the standard library, 512 pieces."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    sources = [str(path) for path in sorted(library.glob("[a-c]*.py"))]
    words = ["--out", str(out), "--vocab_size", "512", "--val_fraction", "0.1"]
    cli.run(["prepare", *sources, *words])
    return out


def words(data, run, *more, objective="clm"):
    trunk = {"clm": "decoder", "mlm": "encoder", "span": "encoder_decoder"}[objective]
    keys = {
        "model.trunk": trunk,
        "model.d_model": 32,
        "model.n_layers": 2,
        "model.n_heads": 4,
        "objective.name": objective,
        "data.path": data,
        "data.row_length": 48,
        "optim.lr": 5e-3,
        "schedule.warmup": 5,
        "train.steps": 20,
        "train.global_batch": 5,
        "eval.batches": 2,
        "run.log_every": 1,
        "run.dir": run,
        "run.wandb.mode": "disabled",
        "run.device": "cpu",
    }
    return ["train", *(f"--{key}={value}" for key, value in keys.items()), *more]


def train(*arguments, **keys):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        cli.run(words(*arguments, **keys))
    return text.getvalue()


def torchrun(ranks, arguments):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *command, "train.py", *arguments[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["clm", "mlm", "span"])
def test_torchrun_and_one_process_print_the_same_losses(prepared, tmp_path, objective):
    one, two = tmp_path / "one", tmp_path / "two"
    printed = train(prepared, one, objective=objective)
    job = torchrun(2, words(prepared, two, "--train.micro_batch=2", objective=objective))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    for left, right in zip(metrics(one), metrics(two), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        if left["kind"] == "train":
            assert f"step {left['step']}  loss {left['loss']:.6f}" in printed
    summary = json.loads((two / "summary.json").read_text())
    assert summary["steps"] == 20 and summary["tokens"] == 20 * 5 * 48
    assert summary["val_loss"] == metrics(two)[-1]["loss"]
    assert summary["bits_per_byte"] > 0 and summary["unigram_bits_per_byte"] > 0
    report = tmp_path / "report.json"
    with contextlib.redirect_stdout(io.StringIO()):
        cli.run(["evaluate", str(one), "--batches=2", f"--json={report}"])
    assert json.loads(report.read_text())["loss"] == pytest.approx(summary["val_loss"], abs=1e-5)


def test_torchrun_told_to_go_leaves_a_checkpoint_and_its_marker(prepared, tmp_path):
    run = tmp_path / "run"
    more = ("--train.steps=100000", "--schedule.warmup=0", "--data.workers=1")
    job = torchrun(2, words(prepared, run, *more))
    while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 3:
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert "--resume auto" in output
    assert (run / "checkpoints" / "preempted").is_file()
    step = int((run / "checkpoints" / "latest").read_text()[5:])
    with pytest.raises(UserError, match="already holds a run"):
        train(prepared, run, *more)
    resumed = ("--resume=auto", f"--train.steps={step + 2}", "--schedule.warmup=0")
    assert f"at step {step}" in train(prepared, run, *resumed)
    assert [line["step"] for line in metrics(run)] == [*range(1, step + 3), step + 2]


def test_other_data_under_the_same_path_is_refused(prepared, tmp_path):
    run = tmp_path / "run"
    train(prepared, run, "--train.steps=2", "--schedule.warmup=0")
    for trainer in run.glob("checkpoints/*/trainer.json"):
        assert json.loads(trainer.read_text())["facts"]["data_hash"]
    manifest = json.loads((prepared / "manifest.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in prepared.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "manifest.json").write_text(json.dumps(manifest | {"data_hash": "another"}))
    with pytest.raises(UserError, match="another data_hash"):
        train(other, run, "--train.steps=2", "--schedule.warmup=0", "--resume=auto")


def test_init_from_starts_a_fresh_run_from_a_trunk(prepared, tmp_path):
    train(prepared, tmp_path / "a", "--train.steps=2", "--schedule.warmup=0")
    more = ("--train.steps=2", "--schedule.warmup=0", f"--init_from={tmp_path / 'a'}")
    assert "weights from" in train(prepared, tmp_path / "b", *more)
    before, after = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert after[0]["loss"] < before[0]["loss"] and after[0]["step"] == 1
