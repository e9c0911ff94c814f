"""Whole runs: text, shards, `nanolm train` and `torchrun train.py`, signals, `nanolm evaluate`."""

import contextlib
import io
import json
import pathlib
import re
import shutil
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


@pytest.mark.parametrize(
    "objective", ["clm", *(pytest.param(o, marks=pytest.mark.slow) for o in ("mlm", "span"))]
)
def test_torchrun_and_one_process_print_the_same_losses(prepared, tmp_path, objective):
    one, two = tmp_path / "one", tmp_path / "two"
    printed = train(prepared, one, objective=objective)
    job = torchrun(2, words(prepared, two, "--train.micro_batch=2", objective=objective))
    output, _ = job.communicate(timeout=600)
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


@pytest.mark.slow
def test_torchrun_told_to_go_leaves_a_checkpoint_and_its_marker(prepared, tmp_path):
    run = tmp_path / "run"
    more = ("--train.steps=100000", "--schedule.warmup=0", "--data.workers=1")
    job = torchrun(2, words(prepared, run, *more))
    while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 3:
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=600)
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


@pytest.fixture(scope="module")
def bases(prepared, tmp_path_factory):
    """A run, and corpora that its data could be taken for: another tokenizer of as many pieces,
    and other documents in the same tokens."""
    folder = tmp_path_factory.mktemp("bases")
    shutil.copytree(prepared, folder / "data")
    train(folder / "data", folder / "run", "--train.steps=2", "--schedule.warmup=0")
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    sources = [str(path) for path in sorted(library.glob("[d-h]*.py"))]
    for name, tokens in (
        ("foreign", ["--vocab_size=512"]),
        ("other", [f"--tokenizer={prepared}"]),
    ):
        cli.run(["prepare", *sources, f"--out={folder / name}", "--val_fraction=0.2", *tokens])
    return folder


STEPS = ("--train.steps=2", "--schedule.warmup=0")


@pytest.mark.parametrize(
    "meeting", ["evaluate", "evaluate --data", "doctor", "init_from", "replay"]
)
@pytest.mark.parametrize("which", ["same", "other", "foreign"])
def test_data_meets_a_checkpoint(prepared, bases, tmp_path, meeting, which):
    """Same hashes or a sentence, unless the user asked for other data in the same tokens."""
    run = bases / "run"
    data = prepared if which == "same" else bases / which
    if meeting in ("evaluate", "doctor", "replay"):  # data.path was prepared anew in place
        shutil.rmtree(bases / "data")
        shutil.copytree(data, bases / "data")
    words = {
        "evaluate": ["evaluate", str(run), "--batches=1"],
        "evaluate --data": ["evaluate", str(run), "--batches=1", f"--data={data}"],
        "doctor": ["doctor", str(run), "2"],
    }.get(meeting)
    asked = meeting in ("evaluate --data", "init_from")
    fits = which == "same" or (which == "other" and asked)
    key = "tokenizer_hash" if which == "foreign" and asked else "_hash"
    refused = (
        contextlib.nullcontext() if fits else pytest.raises(UserError, match=f"another .*{key}")
    )
    with refused:
        if words:
            cli.run(words)
        elif meeting == "init_from":
            train(data, tmp_path / "b", *STEPS, f"--init_from={run}")
        else:
            rule = ("--train.rule.name=replay", f"--train.rule.base={run}", "--train.rule.rows=2")
            train(prepared, tmp_path / "b", *STEPS, *rule)


def test_the_remedies_for_other_data_work(prepared, bases, tmp_path):
    with pytest.raises(UserError, match="--tokenizer") as caught:
        cli.run(["evaluate", str(bases / "run"), f"--data={bases / 'foreign'}"])
    model = re.search(r"--tokenizer (\S+)$", str(caught.value))[1]
    source = sysconfig.get_paths()["stdlib"] + "/h*.py"
    out = ["--out", str(tmp_path / "again"), "--val_fraction=0.2"]
    cli.run(["prepare", source, f"--tokenizer={model}", *out])
    cli.run(["evaluate", str(bases / "run"), f"--data={tmp_path / 'again'}"])
    with pytest.raises(UserError, match="is one of 2 steps"):
        cli.run(["doctor", str(bases / "run"), "100000"])


def test_times_of_the_summary_are_those_of_all_starts(prepared, tmp_path):
    run, summaries, clocks = tmp_path / "run", [], []
    for steps in (40, 40, 80, 80):  # one of two resumes finds nothing to do
        more = (f"--train.steps={steps}", "--resume=auto", "--eval.batches=1")
        began = time.perf_counter()
        train(prepared, run, *more)
        clocks.append(time.perf_counter() - began)
        summaries.append(json.loads((run / "summary.json").read_text()))
        newest = sorted(run.glob("checkpoints/step-*/trainer.json"))[-1]
        spent = json.loads(newest.read_text())["seconds"]
        summary = summaries[-1]
        assert summary["tokens"] == steps * 5 * 48
        assert summary["tokens"] / summary["tokens_per_second"] == pytest.approx(spent, rel=0.1)
        assert spent < summary["seconds"] < sum(clocks)
    seconds = [summary["seconds"] for summary in summaries]
    assert seconds == sorted(seconds) and seconds[2] > seconds[0] + 0.5 * clocks[2]
    assert summaries[1]["tokens_per_second"] == pytest.approx(
        summaries[0]["tokens_per_second"], rel=0.02
    )


def test_a_schedule_that_is_drawn_anew_is_told(prepared, tmp_path):
    run, short = tmp_path / "run", ("--train.steps=12",)
    cosine = ("--schedule.name=cosine", "--resume=auto")
    train(prepared, run, *short, *cosine)
    again = train(prepared, run, *short, *cosine)
    longer = train(prepared, run, "--train.steps=24", *cosine)
    assert "drawn anew" not in again
    assert "train.steps was 12 and is 24" in longer and "at step 13" in longer
    rates = [line["lr"] for line in metrics(run) if line["kind"] == "train"]
    before, now = re.search(r"goes from (\S+) to (\S+) of its peak", longer).groups()
    assert rates[11:13] == pytest.approx([5e-3 * float(before), 5e-3 * float(now)], rel=0.01)


@pytest.mark.parametrize("resume", ["never", "auto"])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--schedule.warmup=100"], "warmup"),
        (["--data.path=NO_VAL"], "no val split"),
        (["--init_from=nowhere"], "nowhere"),
        (["--optim.lr=1e30", "--run.log_every=1"], "step 2: loss or gradient is not finite"),
    ],
)
def test_a_start_that_fails_owns_no_folder(
    prepared, tmp_path, monkeypatch, resume, wrong, sentence
):
    """The mended command, in the same folder, is not refused."""
    run, data = tmp_path / "run", prepared
    if wrong == ["--data.path=NO_VAL"]:
        data = shutil.copytree(prepared, tmp_path / "data")
        manifest = json.loads((prepared / "manifest.json").read_text())
        manifest["splits"]["val"] = []
        (data / "manifest.json").write_text(json.dumps(manifest))
        wrong = []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        train(data, run, *STEPS, "--run.log_every=100", f"--resume={resume}", *wrong)
    train(prepared, run, *STEPS, f"--resume={resume}")
    assert [line["step"] for line in metrics(run)] == [1, 2, 2]
    with pytest.raises(UserError, match="already holds a run"):
        train(prepared, run, *STEPS)


def test_ctrl_c_saves_and_is_no_success(prepared, tmp_path):
    run = tmp_path / "run"
    more = ("--train.steps=100000", "--schedule.warmup=0")
    command = [sys.executable, "-m", "nanolm", *words(prepared, run, *more)]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 3:
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    _, told = job.communicate(timeout=600)
    assert job.returncode == 130 and b"Traceback" not in told
    assert (run / "checkpoints" / "preempted").is_file()
