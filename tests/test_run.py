"""What a run is: the state in its checkpoints, the best of them, and who builds a Trainer."""

import ast
import dataclasses
import json
import math
import os
import signal

import pytest

from nanolm import cli
from nanolm.checkpoint import run_folder
from nanolm.config import strict_yaml
from nanolm.config.load import as_mapping, load_config
from nanolm.config.schema import Config
from nanolm.errors import UserError
from nanolm.training import snapshot
from tests.prepared import train
from tests.test_imports import MODULES
from tests.test_resume import assert_same_bits, metrics
from tests.tiny_run import build_trainer, in_ranks, tiny_config


def test_a_trainer_is_put_together_in_one_place():
    places = [
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Trainer"
    ]
    assert places == ["nanolm.run"]


def fit_with(world, config, figures, kill_after=None):
    """A run whose evaluations say these figures, step by step; its state as a checkpoint has it."""

    def hook(record):
        if (record["step"], record["kind"]) == (kill_after, "train"):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = build_trainer(config, world, hook=hook)
    trainer.selection_score = lambda _: figures[trainer.state.done]
    trainer.fit()
    return trainer.state.to_json()


CURVE = {step: abs(step - 12.5) for step in range(1, 41)} | {4: math.nan, 8: 99.0}


# What test_patience.py asks of two ranks is its sibling: the best is kept, and found after a kill.
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_best_evaluation_is_kept_also_between_two_checkpoints(tmp_path, ranks):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"eval__every": 4, "run__checkpoint_every": 15, "run__keep_last": 1}
    state, *_ = in_ranks(ranks, fit_with, tiny_config(whole, **changes), CURVE)
    assert state["best"] == 0.5 and state["step"] == 40
    kept = {path.name for path in (whole / "checkpoints").glob("step-*")}
    assert kept == {"step-00000012", "step-00000040"}  # the best, and the newest
    assert (whole / "checkpoints" / "best").read_text() == "step-00000012\n"
    # Killed behind the best one, which is the newest then: its evaluation is repeated, not counted
    # twice, and the run ends as the other one did.
    in_ranks(ranks, fit_with, tiny_config(broken, **changes), CURVE, 14, kill=True)
    again, *_ = in_ranks(ranks, fit_with, tiny_config(broken, resume="auto", **changes), CURVE)
    assert_same_bits(whole, broken)
    clock = {"seconds": 0, "elapsed": 0}
    assert again | clock == state | clock


def test_a_first_figure_that_is_no_number_does_not_stay_the_best(tmp_path):
    figures = dict.fromkeys(range(1, 41), math.nan) | {30: 2.0}
    config = tiny_config(tmp_path, eval__every=10)
    (state,) = in_ranks(1, fit_with, config, figures)
    assert state["best"] == 2.0
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000030\n"


def test_a_resumed_run_reads_trainer_json_once(tmp_path, monkeypatch):
    words = ("--train.steps=4", "--run.checkpoint_every=2", "--run.log_every=1")
    train(tmp_path / "run", *words)
    read, original = [], run_folder.read_trainer

    def counted(folder):
        read.append(folder.name)
        return original(folder)

    monkeypatch.setattr(run_folder, "read_trainer", counted)
    monkeypatch.setattr(snapshot, "read_trainer", counted)
    train(tmp_path / "run", "--train.steps=6", *words[1:], "--resume=auto")
    assert read == ["step-00000004"]


def test_rates_of_a_resumed_run_are_of_all_its_steps(tmp_path):
    words = ("--run.checkpoint_every=3", "--run.log_every=1", "--eval.every=0")
    train(tmp_path / "run", "--train.steps=3", *words)
    saved = tmp_path / "run" / "checkpoints" / "step-00000003" / "trainer.json"
    content = json.loads(saved.read_text())
    assert content["seconds"] > 0
    summary = train(tmp_path / "run", "--train.steps=6", *words, "--resume=auto")
    after = json.loads((tmp_path / "run/checkpoints/step-00000006/trainer.json").read_text())
    tokens = 6 * 8 * 32  # steps, rows, tokens
    assert summary["tokens_per_second"] == pytest.approx(tokens / after["seconds"], rel=0.05)


def test_a_run_of_no_steps_saves_and_judges_the_weights_as_they_are(tmp_path):
    summary = train(tmp_path, "--train.steps=0", "--schedule.warmup=0")
    assert summary["steps"] == 0 and summary["tokens_per_second"] is None
    assert summary["val_loss"] == pytest.approx(math.log(512), rel=0.05)
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000000\n"
    assert [line["kind"] for line in metrics(tmp_path)] == ["val"]


def test_doctor_replays_from_the_weights_that_the_run_started_from(tmp_path, capsys):
    train(tmp_path / "base", "--train.steps=3", "--schedule.warmup=0", "--optim.lr=1e-2")
    words = ("--train.steps=4", "--run.log_every=1", "--run.checkpoint_every=4")
    train(tmp_path / "run", *words, f"--init_from={tmp_path / 'base'}")
    first = metrics(tmp_path / "run")[0]
    report = tmp_path / "report.json"
    cli.run(["doctor", str(tmp_path / "run"), "1", f"--json={report}"])
    found = json.loads(report.read_text())
    assert (found["loss"], found["grad_norm"]) == (first["loss"], first["grad_norm"])
    assert "from the initial weights" in capsys.readouterr().out


@pytest.mark.parametrize("group", sorted(dataclasses.asdict(Config())))
def test_a_config_from_before_a_key_goes_on_at_its_default(tmp_path, group):
    """Keys of every group, as if they had come after the run was saved."""
    saved, config = tmp_path / "config.yaml", load_config(["--model.vocab_size=512"])
    whole, standard = as_mapping(config), as_mapping(load_config([]))[group]
    held = whole[group] if isinstance(whole[group], dict) else {}
    others = [
        key
        for key in held
        if held[key] != standard[key] and not run_folder._harmless(f"{group}.{key}")
    ]
    saved.write_text(strict_yaml.dump(whole | {group: {key: held[key] for key in others}}))
    run_folder._same_config(saved, config)
    for key in others:
        rest = {other: value for other, value in held.items() if other != key}
        saved.write_text(strict_yaml.dump(whole | {group: rest}))
        with pytest.raises(UserError, match="another config: "):
            run_folder._same_config(saved, config)


def test_a_config_with_a_key_that_is_gone_is_another_one(tmp_path):
    saved, config = tmp_path / "config.yaml", load_config([])
    whole = as_mapping(config)
    saved.write_text(strict_yaml.dump(whole | {"model": whole["model"] | {"no_such_key": 3}}))
    with pytest.raises(UserError, match=r"model\.no_such_key \(3 there, None here\)"):
        run_folder._same_config(saved, config)


def test_plug_ins_of_a_saved_config_that_nobody_named_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "unnamed_plugin.py").write_text("raise RuntimeError('it was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    saved, config = tmp_path / "config.yaml", load_config([])
    saved.write_text(strict_yaml.dump(as_mapping(config) | {"plugins": ["unnamed_plugin"]}))
    run_folder._same_config(saved, config)
