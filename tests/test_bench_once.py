"""One contestant of a benchmark alone: `python -m nanolm.tools.bench.once`."""

import json
import math
import subprocess
import sys

import pytest
import torch

from nanolm.errors import UserError
from nanolm.tools.bench import once
from nanolm.tools.bench.clock import Clock
from nanolm.tools.bench.once import measure
from nanolm.training.throughput import peak_flops
from tests.hidden import hide
from tests.test_bench_device import JOB, PLAIN, ROOT
from tests.test_bench_train import TINY


def test_one_contestant_alone_says_what_it_found(tmp_path, monkeypatch):
    settings = {"model": "nanolm", "objective": "mlm", "kernels": {"norm": "reference"}}
    trace = tmp_path / "traces" / "step.json"
    found = measure(JOB | {"settings": settings, "trace": str(trace)})
    assert found["contestant"] == "nanolm" and found["objective"] == "mlm"
    assert not found["compile"] and found["precision"] == "bf16" and found["shape"] == TINY
    assert found["kernels"]["norm"] == "reference"
    assert set(found["kernels"]) >= {"attention", "linear_cross_entropy", "norm"}
    rate = found["tokens_per_second"]
    assert rate == pytest.approx(32 / found["free_step_ms"] * 1e3) and found["step_ms"] > 0
    assert found["mfu"] == pytest.approx(found["model_tflops"] / found["peak_tflops"])
    assert "measured on this CPU" in found["peak_source"]
    assert found["peak_bytes"] > 0 and found["reserved_bytes"] is found["host_waits"] is None
    assert all(3.5 < loss < 5.0 for loss in found["losses"]) and len(found["losses"]) == 2
    assert list(found["phases"]) == ["data", "forward", "loss", "backward", "optimizer"]
    steps = [
        event
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("name") == "Optimizer.step#AdamW.step"
    ]
    assert len(steps) == once.TRACED and "aten::" in found["operators"]


def test_one_contestant_takes_its_warm_up_and_its_turn(monkeypatch):
    taken, turns = [], []
    take, turn = Clock.take, Clock.turn
    monkeypatch.setattr(Clock, "take", lambda self, step: taken.append(1) or take(self, step))
    monkeypatch.setattr(Clock, "turn", lambda *given: turns.append(given[2]) or turn(*given))
    found = measure(JOB | {"settings": PLAIN})
    assert len(taken) == 2 + 3 and turns == [3]
    assert found["kernels"] == {} and "operators" not in found


def test_one_contestant_that_cannot_take_part_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch_s = {"model": "nanolm", "objective": "clm", "kernels": {"attention": "nobody's"}}
    with pytest.raises(UserError, match="nobody's"):
        measure(JOB | {"settings": torch_s})
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        measure(JOB | {"settings": PLAIN, "device": "cuda"})
    hide(monkeypatch, "transformers")
    with pytest.raises(UserError, match="pip install 'nanolm\\[hf\\]'"):
        measure(JOB | {"settings": {"model": "transformers-bert", "objective": "mlm"}})


@pytest.mark.slow
def test_one_contestant_as_a_process_prints_one_line_or_one_sentence():
    def run(job):
        command = [sys.executable, "-m", "nanolm.tools.bench.once", json.dumps(job)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    done = run(JOB | {"settings": PLAIN})
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["contestant"] == "plain-gpt"
    kernels = {"kernels": {"attention": "nobody's"}}
    done = run(JOB | {"settings": {"model": "nanolm", "objective": "clm", **kernels}})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("model", ["nanolm", "plain-gpt"])
def test_one_contestant_alone_on_a_gpu(model, tmp_path):
    shape = TINY | {"d_model": 64, "vocab_size": 512, "row_length": 64}
    job = JOB | {"shape": shape, "settings": {"model": model, "objective": "clm"}}
    found = measure(job | {"device": "cuda", "trace": str(tmp_path / "trace.json")})
    assert found["device"] == torch.cuda.get_device_name(0)
    assert found["reserved_bytes"] >= found["peak_bytes"] > 4 * found["parameters"]
    assert found["host_waits"] >= (1 if model == "nanolm" else 0)  # nanolm reads its loss
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert sum(found["phases"].values()) > 0
    peak, _ = peak_flops(torch.device("cuda", 0), "bf16")
    assert (found["mfu"] is None) == (peak is None)
    assert "cuda" in (tmp_path / "trace.json").read_text()
