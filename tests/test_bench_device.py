"""Benchmarks by device: how a GPU's steps are timed, which cells are whose, one contestant alone.

No time is asserted. A GPU is stood in for by functions that record what is asked of it.
"""

import json
import pathlib
import warnings

import numpy as np
import pytest
import torch

from nanolm.cli import main
from nanolm.errors import UserError
from nanolm.tools.bench import clock as bench_clock
from nanolm.tools.bench import contest, train_contest
from nanolm.tools.bench import finetune as bench_finetune
from nanolm.tools.bench import step as bench_step
from nanolm.tools.bench.cells import Cells
from nanolm.tools.bench.clock import Clock, CudaClock, clock_on
from nanolm.tools.bench.shape import Shape
from nanolm.tools.bench.step import build_step
from nanolm.tools.bench.texts import Examples
from tests.test_bench_train import TINY, FakePlayer

ROOT = pathlib.Path(__file__).parents[1]
PLAIN = {"model": "plain-gpt", "objective": "clm"}
JOB = {"precision": "bf16", "shape": TINY, "device": "cpu", "threads": 1, "warmup": 2, "steps": 3}


def test_cells_of_different_cards_never_mix(tmp_path, monkeypatch):
    cells, taken = Cells(str(tmp_path / "cells.json")), []

    def take():
        taken.append(1)
        return {"number": len(taken)}

    what = {"jobs": {}, "rounds": 1}
    found = []
    for card in ("NVIDIA H100", "NVIDIA L4", "NVIDIA H100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, card=card: card)
        found.append(cells.get(what, take, "cuda")["number"])
    assert [*found, cells.get(what, take)["number"]] == [1, 2, 1, 3]
    machines = [cell["machine"] for cell in cells.finished.cells.values()]
    assert [m.get("device") for m in machines] == ["NVIDIA H100", "NVIDIA L4", None]


class FakeGpuPlayer(FakePlayer):
    """The same on a GPU that does 1e12 FLOP/s by its data sheet."""

    jobs = []

    def __init__(self, job, module):
        super().__init__(job, module)
        self.jobs.append(job)
        self.facts |= {"peak_flops": 1e12, "host_waits": 3, "first_loss": 9.0, "kernels": {}}

    def turn(self):
        figures = super().turn() | {"waited_seconds": [4.0], "reserved_bytes": 5e6}
        self.turns[-1] = figures
        return figures


def test_on_a_gpu_mfu_is_of_the_data_sheets_peak(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake 1")
    monkeypatch.setattr(train_contest, "why_not", lambda job, device: None)
    monkeypatch.setattr(contest, "Player", FakeGpuPlayer)
    FakeGpuPlayer.jobs.clear()
    out = tmp_path / "figures.json"
    words = ["bench", "train", "--rounds=2", "--objectives=[clm]", "--precisions=[bf16]"]
    words += [f"--results={tmp_path / 'cells.json'}", "--compile=false"]
    main([*words, f"--json={out}"])
    for job in FakeGpuPlayer.jobs:
        assert job["device"] == "cuda" and job["steps"] == 10 and job["warmup"] == 8
        assert job["settings"]["model"] != "matmul"
    (report,) = json.loads(out.read_text())["reports"]
    assert report["device"] == "NVIDIA Fake 1" and report["peak_tflops"] == 1.0
    row = report["rows"]["nanolm"]
    assert row["mfu"] == pytest.approx(row["model_tflops"])
    assert (row["waited_seconds"], row["host_waits"], row["reserved_bytes"]) == (4.0, 3, 5e6)
    assert row["losses"] == [9.0, 4.0]
    printed = capsys.readouterr().out
    assert "NVIDIA Fake 1: 1 TFLOP/s by its data sheet" in printed
    for word in ("host waits", "4000.00 ms", "reserved MB", "9.00 to 4.00"):
        assert word in printed
    monkeypatch.setattr(contest, "Player", None)
    main(words)  # found
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(contest, "Player", FakeGpuPlayer)
    main([*words, "--device=cpu"])  # not found: another device
    assert "matrix product" in capsys.readouterr().out


def test_an_unknown_gpu_has_no_mfu(tmp_path, monkeypatch, capsys):
    class Unknown(FakeGpuPlayer):
        def __init__(self, job, module):
            super().__init__(job, module)
            self.facts["peak_flops"] = None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake 2")
    monkeypatch.setattr(train_contest, "why_not", lambda job, device: None)
    monkeypatch.setattr(contest, "Player", Unknown)
    words = ["bench", "train", "--rounds=1", "--objectives=[mlm]", "--precisions=[bf16]"]
    main([*words, f"--results={tmp_path / 'cells.json'}"])
    printed = capsys.readouterr().out
    assert "NVIDIA Fake 2, whose peak is not known" in printed and "%  " not in printed


class Loss(torch.Tensor):
    """A loss that says when it is read."""

    log = []

    def item(self):
        self.log.append("read")
        return 1.5


class FakeEvent:
    """An event on a device that takes a millisecond from each to the next."""

    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.recorded += 1
        self.at = FakeEvent.recorded

    def elapsed_time(self, other):
        return float(other.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device that notes in the returned list what it is asked to do."""
    log = Loss.log = []
    noted = {
        "synchronize": "wait",
        "empty_cache": "give back",
        "reset_peak_memory_stats": "forget",
    }
    for name, word in noted.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, word=word: log.append(word))
    figures = {"max_memory_allocated": 70, "max_memory_reserved": 90, "memory_allocated": 5}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", log.append)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return log


def noting(log):
    """A step that marks two phases and notes that it was taken."""

    def step(clock):
        log.append(clock.step)
        clock.mark("data")
        clock.mark("forward")
        clock.mark("optimizer")
        return {"loss": torch.ones(()).as_subclass(Loss), "tokens": 7}

    return step


def test_steps_of_a_turn_on_a_gpu_run_freely_and_only_their_end_is_waited_for(gpu):
    clock = clock_on("cuda")
    turn = clock.turn(noting(gpu), 3)
    freely = [0, "wait", 1, 2, 3, "wait"]
    waiting = [4, "wait", 5, "wait", 6, "wait"]
    assert gpu[: len(freely)] == freely
    rest = [word for word in gpu[len(freely) :] if word != "read"]
    assert rest == [*waiting, "give back"] and gpu.count("read") == 3
    assert len(turn["seconds"]) == 3 and len(set(turn["seconds"])) == 1
    assert len(turn["waited_seconds"]) == len(turn["cpu_seconds"]) == 3
    assert turn["loss"] == [1.5] * 3 and turn["tokens"] == [7] * 3
    assert turn["phases"] == dict.fromkeys(("data", "forward", "optimizer"), 0.001)
    assert (turn["peak_bytes"], turn["reserved_bytes"]) == (70, 90)


def test_the_peak_of_a_gpu_is_forgotten_after_all_is_done_and_given_back(gpu):
    clock = CudaClock()
    clock.forget_peak()
    assert gpu == ["wait", "give back", "forget"]
    assert clock.held_before(lambda: pytest.fail("no toy is needed")) == 5


def test_waits_of_the_host_are_counted_and_the_watch_is_ended(gpu):
    def step(clock):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return {"loss": 1.0}

    clock = CudaClock()
    assert clock.count_waits(step) == 3
    assert gpu == ["wait", "warn", "default"]

    def failing(clock):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        clock.count_waits(failing)
    assert gpu[-1] == "default"


def test_a_clock_on_a_cpu_times_each_step_and_reads_losses_at_the_end(monkeypatch):
    log = Loss.log = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clock = clock_on("auto")
    assert type(clock) is Clock and clock.device.type == "cpu"
    turn = clock.turn(noting(log), 2)
    assert log == [0, 1, "read", "read"]
    assert len(turn["seconds"]) == 2 and turn["peak_bytes"] > 0
    assert list(turn["phases"]) == ["data", "forward", "optimizer"]
    assert sum(clock.phases[0].values()) <= clock.seconds[0]
    assert clock.count_waits(noting(log)) is None and clock.data_sheet_peak("bf16") is None
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        clock_on("cuda")


def test_memory_before_a_model_on_a_cpu_has_all_that_a_toy_loads():
    held, at_first = [], bench_clock.resident_bytes(peak=False)
    before = Clock().held_before(lambda: held.append(torch.ones(1 << 24)))  # 64 MiB
    assert len(held) == 1 and before - at_first > 1 << 25


def test_no_step_of_a_peer_waits_to_read_a_number(monkeypatch):
    clock = Clock()
    step = build_step({"settings": PLAIN, "precision": "bf16"}, Shape(**TINY))
    step.prepare(clock)

    def read(*_):
        raise AssertionError("a step read a tensor's number")

    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, read)
    clock.take(step)


@pytest.mark.parametrize("model", ["nanolm", "plain-gpt"])
def test_half_precision_scales_the_loss_and_moves_the_weights(model):
    settings = {"model": model, "objective": "clm"}
    step = build_step({"settings": settings, "precision": "fp16"}, Shape(**TINY))
    losses = Clock().turn(step, 6)["loss"]
    scaler = step.trainer.update.scaler if model == "nanolm" else step.scaler
    assert scaler.is_enabled() and len(set(losses)) > 1


class Noting(Clock):
    """A clock on a CPU that notes what a contestant asks of it."""

    def __init__(self):
        super().__init__()
        self.log = []

    def take(self, step):
        self.log.append("step")
        return super().take(step)

    def count_waits(self, step):
        self.log.append("count")
        return 4

    def forget_peak(self):
        self.log.append("forget")


@pytest.mark.parametrize("module", [bench_step, bench_finetune])
def test_a_contestant_gives_its_memory_back_before_it_waits_for_its_turn(module, monkeypatch):
    clock, served = Noting(), []
    monkeypatch.setattr(module, "clock_on", lambda device: clock)
    monkeypatch.setattr(module, "serve", lambda *given: served.append(given))
    rows = Examples([np.full(n, 5) for n in range(3, 9)], np.zeros(6, dtype=np.int64))
    monkeypatch.setattr(Examples, "load", lambda path: rows)
    shape = TINY | ({"n_classes": 2} if module is bench_finetune else {})
    settings = {"model": "nanolm", "objective": "clm", "compile": False}
    module.enter(JOB | {"settings": settings, "shape": shape, "data": "examples"})
    assert clock.log == ["step", "step", "count", "forget"]
    ((facts, turn),) = served
    assert facts["host_waits"] == 4 and facts["kernels"] and facts["parameters"] > 0
    assert len(turn()["seconds"]) == JOB["steps"]
