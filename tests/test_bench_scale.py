"""bench scale: real processes, cells that are found again, honest arithmetic; no time asserted."""

import json

import pytest
import torch

from nanolm.commands.bench import scale
from nanolm.commands.bench.scale import Arguments
from nanolm.config.load import parse
from nanolm.errors import UserError
from nanolm.tools.bench import contest, scaling
from nanolm.tools.bench.cells import Cells
from nanolm.training.phases import PHASES

TINY = {"n_layers": 1, "d_model": 32, "n_heads": 2, "row_length": 16, "batch": 4, "vocab_size": 64}


def measure(arguments, kind, cells):
    return scaling.measure(arguments.job, kind, arguments.processes, arguments.rounds, cells)


@pytest.mark.slow
def test_one_and_two_processes_are_measured_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contest, "stolen_seconds", lambda: 0.0)
    results, out = str(tmp_path / "cells.json"), tmp_path / "out.json"
    keys = {**TINY, "rounds": 1, "steps": 2, "warmup": 1, "device": "cpu", "results": results}
    scale.run(Arguments(**keys, json=str(out)))
    first = json.loads(out.read_text())
    found = {(row["scaling"], row["processes"]) for row in first["rows"]}
    assert found == {("strong", 1), ("strong", 2), ("weak", 1), ("weak", 2)}
    for row in first["rows"]:
        assert set(row["phases"]) == set(PHASES) and sum(row["phases"].values()) > 0
        assert len(row["turn_seconds"]) == 1
    assert len(json.loads((tmp_path / "cells.json").read_text())["cells"]) == 3
    monkeypatch.setattr(scaling, "run_process", lambda *_: pytest.fail("measured again"))
    scale.run(Arguments(**keys, json=str(out)))
    assert json.loads(out.read_text()) == first
    assert "efficiency" in capsys.readouterr().out


def test_efficiency_is_time_or_work_over_processes(tmp_path, monkeypatch):
    def fake(job, module):
        rows = job["shape"]["batch"] / job["settings"]["processes"]
        phases = dict.fromkeys(PHASES, 0.0)
        return {"seconds": [0.1 * rows + 0.1], "phases": phases, "device": "cpu"}

    monkeypatch.setattr(scaling, "run_process", fake)
    monkeypatch.setattr(contest, "stolen_seconds", lambda: 0.0)
    cells = Cells(str(tmp_path / "cells.json"))
    arguments = Arguments(**TINY, rounds=2)
    strong = measure(arguments, "strong", cells)
    weak = measure(arguments, "weak", cells)
    assert [row["step_seconds"] for row in strong] == pytest.approx([0.5, 0.3])
    assert [row["efficiency"] for row in strong] == pytest.approx([1.0, 0.5 / 0.6])
    assert [row["efficiency"] for row in weak] == pytest.approx([1.0, 1.0])
    assert [row["speed"] for row in weak] == pytest.approx([1.0, 2.0])
    with pytest.raises(UserError, match="processes"):
        parse(Arguments, ["--processes=[0]"], prog="bench scale")


def test_turns_in_which_the_host_took_the_cores_are_taken_again(tmp_path, monkeypatch):
    measured = iter([9.0, 9.0, 0.5, 0.3, 0.5, 0.3])
    stolen = iter([0, 1e9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    phases = dict.fromkeys(PHASES, 0.0)
    monkeypatch.setattr(
        scaling,
        "run_process",
        lambda *_: {"seconds": [next(measured)], "phases": phases, "device": "cpu"},
    )
    monkeypatch.setattr(contest, "stolen_seconds", lambda: next(stolen))
    cells = Cells(str(tmp_path / "cells.json"))
    found = measure(Arguments(**TINY, rounds=2), "strong", cells)
    assert [row["turn_seconds"] for row in found] == [[0.5, 0.5], [0.3, 0.3]]


def test_a_gpu_is_part_of_the_key_and_asked_for_in_vain_is_one_sentence(tmp_path, monkeypatch):
    taken = []
    phases = dict.fromkeys(PHASES, 0.0)
    measured = {"seconds": [1.0], "phases": phases, "device": "cuda:0"}
    monkeypatch.setattr(scaling, "run_process", lambda *_: taken.append(1) or dict(measured))
    monkeypatch.setattr(contest, "stolen_seconds", lambda: 0.0)
    cells = Cells(str(tmp_path / "cells.json"))
    arguments = Arguments(**TINY, rounds=1)  # device auto
    for available, name, count in (
        (False, "", 2),
        (True, "NVIDIA H100", 4),
        (True, "NVIDIA L4", 6),
        (True, "NVIDIA H100", 6),
        (False, "", 6),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        measure(arguments, "strong", cells)
        assert len(taken) == count
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        measure(Arguments(**TINY, device="cuda"), "strong", cells)
