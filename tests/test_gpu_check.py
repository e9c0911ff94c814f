"""`nanolm doctor --gpu`, with the CPU as stand-in for the GPU that this machine may lack."""

import json

import pytest
import torch

from nanolm import cli
from nanolm.commands import doctor
from nanolm.errors import UserError
from nanolm.tools import gpu_check
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.survey import Patient


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return gpu_check.small_corpus(tmp_path_factory.mktemp("gpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence_and_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--gpu", "true"])
    assert caught.value.code == 2
    assert "finds no GPU on this machine" in capsys.readouterr().err
    with pytest.raises(UserError, match="nanolm doctor RUN STEP"):
        cli.run(["doctor"])


@pytest.mark.slow
def test_losses_of_the_device_are_those_of_the_cpu(data, tmp_path):
    verdict = gpu_check.check_losses("cpu", tmp_path, data)
    assert verdict.passed and "20 float32 losses" in verdict.words
    assert "at most 0.0e+00 from the CPU's" in verdict.words


@pytest.mark.slow
def test_a_killed_rank_and_the_lines_for_the_readme(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "KILL_STEPS", 60)
    report = tmp_path / "report.json"
    doctor.check_gpu(doctor.Arguments(gpu=True, json=str(report)), device="cpu")
    found = json.loads(report.read_text())
    assert [row["name"] for row in found] == ["kernels", "training", "bfloat16", "kill and resume"]
    assert all(row["passed"] for row in found)
    assert "last loss bit-equal, torchrun ended with 0" in found[3]["words"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 4 and all("| passed, CPU as stand-in, " in line for line in lines)


@pytest.mark.parametrize(
    ("device", "gpus", "backend"),
    [("cuda", 1, "gloo"), ("cuda", 2, "nccl"), ("cuda", 8, "nccl"), ("cpu", 0, "gloo")],
)
def test_ranks_that_share_a_gpu_are_joined_by_gloo(monkeypatch, device, gpus, backend):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert gpu_check.backend_of(device, 2) == backend


def test_the_cpu_stands_in_for_a_gpu_when_it_is_named(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "check_gpu", lambda arguments, device: seen.append(device))
    for words in (["--device", "cpu"], ["--device", "cuda"], []):
        cli.run(["doctor", "--gpu", *words])
    assert seen == ["cpu", "cuda", "cuda"]


def test_a_wrong_kernel_fails_the_verdict(tmp_path, monkeypatch):
    right, wrong = Finding("a", "pass", ""), Finding("b", "FAIL", "far off")
    found = [(Patient("norm", "x", True), [right, right, right, wrong])]
    monkeypatch.setattr(gpu_check, "survey", lambda device, quick, jobs: iter(found))
    verdict = gpu_check.check_kernels("cpu", tmp_path)
    assert not verdict.passed and "norm x wrong" in verdict.words
    assert "FAILED, some GPU" in verdict.line("some GPU")
