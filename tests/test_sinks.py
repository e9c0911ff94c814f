"""Metrics reach their places, and a logging service that fails takes nothing down with it."""

import io
import json
import sys
import types

import pytest

from nanolm.checkpoint.run_folder import cut_metrics
from nanolm.config.schema import WandbConfig
from nanolm.training import sinks

RECORD = {"step": 3, "kind": "train", "loss": 1.25, "lr": 1e-3, "mfu": None}


def test_json_lines_are_json_even_when_figures_are_not_finite(tmp_path):
    sink = sinks.JsonLines(tmp_path / "metrics.jsonl")
    sink.write(RECORD | {"grad_norm": float("nan"), "loss": float("inf")})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["grad_norm"] is None
    sink.close()


def test_a_resumed_run_cuts_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kinds = [(1, "train"), (1, "val"), (2, "train"), (2, "val"), (3, "train")]
    text = [json.dumps({"step": step, "kind": kind}) + "\n" for step, kind in kinds]
    path.write_text("".join(text) + '{"step": 4, "ki')
    cut_metrics(path, 2)
    assert path.read_text() == "".join(text[:3])


def test_plain_lines_without_a_terminal_and_a_bar_on_one():
    stream = io.StringIO()
    console = sinks.Console(10, stream=stream)
    console.write(RECORD)
    console.note("a note")
    console.close()
    assert stream.getvalue() == "train step 3  loss 1.250000  lr 1.000e-03\na note\n"


def write_three(tmp_path, notes):
    sink = sinks.Wandb(tmp_path, WandbConfig(mode="offline"), {}, notes.append)
    for step in range(3):
        sink.write(RECORD | {"step": step})
    sink.close()


def fake_wandb(monkeypatch, init):
    module = types.ModuleType("wandb")
    module.Settings, module.init = dict, init
    module.login = lambda **keys: False
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_told_once(tmp_path, monkeypatch, where):
    def fail(*arguments, **keys):
        raise OSError("server unreachable")

    run = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
    if where != "init":
        setattr(run, where, fail)
    fake_wandb(monkeypatch, fail if where == "init" else lambda **keys: run)
    notes = []
    write_three(tmp_path, notes)
    assert notes == ["W&B is off for the rest of this run: OSError: server unreachable"]


def test_a_wandb_that_hangs_is_left_behind(tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr(sinks.Wandb, "TIMEOUT", 0.2)
    stuck = threading.Event()
    fake_wandb(monkeypatch, lambda **keys: stuck.wait())
    notes = []
    write_three(tmp_path, notes)
    stuck.set()
    assert "did not finish" in notes[0]


def test_wandb_offline_writes_inside_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.Wandb, "TIMEOUT", 300)  # its service starts slowly on a busy machine
    notes = []
    write_three(tmp_path, notes)
    assert notes == [] and len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_starts_that_wandb_keeps_offline_are_told_how_they_become_one(tmp_path, monkeypatch):
    def init(**keys):
        (tmp_path / "wandb" / f"offline-run-{len(list(tmp_path.glob('wandb/off*')))}").mkdir()
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    fake_wandb(monkeypatch, init)
    notes = []
    write_three(tmp_path, notes)
    assert notes == []
    write_three(tmp_path, notes)
    assert len(notes) == 1 and f"wandb sync {tmp_path}/wandb/offline-run-*" in notes[0]


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    sink = sinks.TensorBoard(tmp_path)
    sink.write(RECORD)
    sink.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
