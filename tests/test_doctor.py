"""`nanolm doctor`: a run that blew up is taken again, exactly, and the guilty module is named."""

import json

import pytest

from nanolm import cli
from nanolm.errors import UserError
from tests.prepared import train


@pytest.fixture(scope="module")
def blown_up(tmp_path_factory):
    """A learning rate that overflows float32 after a few steps; the run stops by itself."""
    run = tmp_path_factory.mktemp("doctor") / "run"
    words = ("--train.steps=30", "--schedule.warmup=0", "--train.clip=null")
    with pytest.raises(UserError, match="not finite") as caught:
        train(
            run,
            *words,
            *("--optim.name=sgd", "--optim.lr=1e4", "--model.dropout=0.1"),
            *("--run.checkpoint_every=1", "--run.log_every=1", "--run.keep_last=30"),
        )
    return run, str(caught.value)


def doctor(run, step, report):
    cli.run(["doctor", str(run), str(step), f"--json={report}"])
    return json.loads(report.read_text())


def test_the_bad_step_is_replayed_and_its_first_bad_tensor_named(blown_up, tmp_path, capsys):
    run, sentence = blown_up
    (record,) = map(json.loads, (run / "nonfinite.jsonl").read_text().splitlines())
    found = doctor(run, record["step"], tmp_path / "report.json")
    assert found["first non-finite tensor"] == record["tensor"] and record["tensor"] in sentence
    assert found["rows"] == record["rows"] and found["rank"] == record["rank"] == 0
    assert "first non-finite tensor" in capsys.readouterr().out


def test_a_good_step_is_replayed_bit_for_bit(blown_up, tmp_path):
    run, _ = blown_up
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    second = next(line for line in lines if line["step"] == 2)
    found = doctor(run, 2, tmp_path / "report.json")
    assert (found["loss"], found["grad_norm"]) == (second["loss"], second["grad_norm"])
    assert found["first non-finite tensor"] == "none"
    with pytest.raises(UserError, match="step=0 must be at least 1"):
        doctor(run, 0, tmp_path / "report.json")
