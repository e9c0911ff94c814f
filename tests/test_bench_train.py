"""bench train: fair contestants, resumable cells, honest arithmetic; no time is asserted."""

import dataclasses
import json

import pytest
import torch

from nanolm import bench_cells, bench_peers
from nanolm.bench_cells import Cells
from nanolm.bench_shape import Clock, Shape
from nanolm.bench_step import NanolmStep, build_step
from nanolm.cli import main
from nanolm.commands.bench_train import Arguments, against_best, contestants
from nanolm.errors import UserError

TINY = {"n_layers": 1, "d_model": 32, "n_heads": 2, "row_length": 16, "batch": 2, "vocab_size": 64}
SHAPE = Shape(**TINY)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps_of(name, settings, precision="fp32", count=2):
    step, clock = build_step({"settings": settings, "precision": precision}, SHAPE), Clock()
    step.prepare(clock)
    losses = []
    for _ in range(count):
        clock.start()
        losses.append(step(clock))
        clock.stop()
    return step, clock, losses


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_all_contestants_train_the_same_number_of_parameters_from_the_same_loss(objective):
    counts = {}
    for name, settings in contestants(objective).items():
        step, clock, losses = steps_of(name, settings)
        assert all(3.5 < loss < 5.0 for loss in losses), name  # log 64 = 4.16
        assert list(clock.phases[0]) == ["data", "forward", "loss", "backward", "optimizer"], name
        assert sum(clock.phases[1].values()) <= clock.seconds[1]
        counts[name] = step.n_parameters
    plain = next(name for name in counts if name.startswith("plain"))
    others = {count for name, count in counts.items() if name != plain}
    assert len(others) == 1
    # The plain encoder has neither BERT's segments and transform nor its vocabulary bias.
    assert abs(counts[plain] - others.pop()) <= (0 if objective == "clm" else 2000)


@pytest.mark.parametrize("model", ["nanolm", "plain-gpt"])
def test_a_step_moves_the_weights_by_a_clipped_gradient(model):
    step, _, losses = steps_of(model, {"model": model, "objective": "clm"}, "bf16", count=8)
    assert losses[-1] != losses[0]
    if isinstance(step, NanolmStep):
        assert step.trainer.done == 8
        assert step.trainer.config.train.clip == 1.0


def test_batches_of_peers_have_the_objectives_targets():
    tokens, targets = bench_peers.peer_batches(SHAPE, "clm", 1)[0]
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    tokens, targets = bench_peers.peer_batches(SHAPE, "mlm", 1)[0]
    assert ((targets != -100).sum(dim=1) == SHAPE.n_masked).all()
    assert SHAPE.n_masked == 2 and Shape().n_masked == 38


def test_finished_cells_are_kept_and_found(tmp_path, monkeypatch, capsys):
    calls = []

    def fake(job, module):
        calls.append(job)
        if job["settings"]["model"] == "matmul":
            return {"matmul_flops": 1e11}
        slow = 2.0 if job["settings"].get("compile") else 1.0
        seconds = [slow * (2 if job["settings"]["model"] != "nanolm" else 1)]
        phases = dict.fromkeys(("data", "forward", "loss", "backward", "optimizer"), 0.2)
        return {
            "seconds": seconds,
            "cpu_seconds": seconds,
            "phases": phases,
            "peak_bytes": 3e6,
            "before_bytes": 1e6,
            "parameters": 5,
        }

    monkeypatch.setattr(bench_cells, "run_process", fake)
    words = ["bench", "train", "--objectives=[clm]", "--precisions=[fp32]", "--rounds", "2"]
    words += ["--results", str(tmp_path / "cells.json"), "--json", str(tmp_path / "figures.json")]
    main(words)
    n_calls, printed = len(calls), capsys.readouterr().out
    main(words)
    assert len(calls) == n_calls and capsys.readouterr().out == printed  # nothing measured twice
    order = [job["settings"]["model"] for job in calls[-12:]]
    assert order[:6] == order[6:]  # A B C A B C
    assert not any(job["settings"].get("compile") for job in calls[-12:])  # slower in the trial
    report = json.loads((tmp_path / "figures.json").read_text())["reports"][0]
    assert report["against_best"]["speed"] == 2.0
    assert report["rows"]["nanolm"]["tokens_per_second"] == Shape().tokens
    assert "2.00x" in printed
    main([*words, "--fresh", "true"])
    assert len(calls) == 2 * n_calls


def test_a_results_file_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "cells.json").write_text("[]")
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "train", "--results", str(tmp_path / "cells.json")])
    assert leaving.value.code == 2
    assert "cells.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "train", "--objectives=[nlp]"])
    assert "nlp" in capsys.readouterr().err


def test_a_process_measures_and_a_failed_one_says_why(tmp_path):
    arguments = Arguments(warmup=1, steps=1, threads=1, **TINY)
    job = {
        "precision": "fp32",
        "shape": dataclasses.asdict(arguments.shape),
        "threads": 1,
        "warmup": 1,
        "steps": 1,
        "settings": {"model": "nanolm", "objective": "mlm"},
    }
    cells = Cells(str(tmp_path / "cells.json"))
    result = cells.measure(job, 1)
    assert len(result["seconds"]) == 1 and result["peak_bytes"] > result["before_bytes"] > 0
    with pytest.raises(UserError, match="KeyError"):
        cells.measure(job | {"settings": {"model": "nobody", "objective": "clm"}}, 1)
    assert len(Cells(str(tmp_path / "cells.json")).cells) == 1


def test_ratios_are_against_the_fastest_of_the_others():
    row = {"cpu_seconds": 1.0, "peak_bytes": 10.0, "training_bytes": 4.0}
    rows = {
        "nanolm": row | {"step_seconds": 1.0, "training_bytes": 2.0},
        "nanolm, reference kernels": row | {"step_seconds": 0.5},
        "a": row | {"step_seconds": 3.0},
        "b": row | {"step_seconds": 2.0},
    }
    ratio = against_best(rows)
    assert ratio["best"] == "b" and ratio["speed"] == 2.0 and ratio["training_memory"] == 0.5
