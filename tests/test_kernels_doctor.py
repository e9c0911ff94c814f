"""kernels doctor: any number of processes says the same, and what is missing is one sentence."""

import dataclasses
import json
import os

import pytest
import torch

from nanolm import cli
from nanolm.ops.contract import candidates
from nanolm.tools.kernel_check import survey
from nanolm.tools.kernel_check.attention_cases import LARGE, MIXED, SINGLE
from nanolm.tools.kernel_check.attention_corners import CORNERS
from nanolm.tools.kernel_check.attention_habits import QUESTIONS
from nanolm.tools.kernel_check.conformance import Finding, check_kernel, checks_of
from nanolm.tools.kernel_check.examination import Errand, errands
from nanolm.tools.kernel_check.habits import HABITS
from nanolm.tools.kernel_check.leaks import KINDS
from nanolm.tools.kernel_check.main_loops import LONG
from nanolm.tools.kernel_check.survey import MOST_JOBS, Patient, default_jobs, describe
from nanolm.tools.kernel_check.workers import findings
from tests.hidden import hide


@dataclasses.dataclass(frozen=True)
class WhoAmI(Errand):
    """Says which process took it, and fails every third time."""

    def run(self):
        return Finding(str(self.number), "pass" if self.number % 3 else "FAIL", str(os.getpid()))


@dataclasses.dataclass(frozen=True)
class Deadly(Errand):
    """Ends its process, as a crash in a kernel does."""

    def run(self):
        os._exit(3)


def whoami(count):
    return [WhoAmI("norm", "torch", "cpu", True, number) for number in range(count)]


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path, monkeypatch, capsys):
    few = [Patient("norm", "torch", True), Patient("linear_cross_entropy", "chunked", True)]
    monkeypatch.setattr(survey, "patients", lambda device: few)
    said = []
    for jobs in (1, 2):
        path = tmp_path / f"{jobs}.json"
        words = ["--device", "cpu", "--jobs", str(jobs), "--json", str(path)]
        cli.run(["kernels", "doctor", *words])
        said.append((capsys.readouterr().out, json.loads(path.read_text())))
    assert said[0] == said[1]
    rows = said[0][1]
    assert [row["kernel"] for row in rows] == ["torch", "chunked"]
    for row, patient in zip(rows, few, strict=True):
        assert row["passed"] == len(checks_of(patient.op)) and row["failed"] == 0 and row["auto"]


@pytest.mark.slow
def test_errands_are_done_elsewhere_and_come_back_in_order():
    elsewhere = list(findings(whoami(7), 2))
    assert [finding.check for finding in elsewhere] == list("0123456")
    assert [finding.verdict for finding in elsewhere] == [f.verdict for f in findings(whoami(7), 1)]
    assert str(os.getpid()) not in {finding.words for finding in elsewhere}
    assert {finding.words for finding in findings(whoami(2), 1)} == {str(os.getpid())}


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_errand_that_ends_its_process_fails_and_the_others_do_not(jobs):
    todo = [*whoami(2), Deadly("norm", "torch", "cpu", True, 2), *whoami(2)]
    found = list(findings(todo, jobs, ["tests.hidden"]))
    assert [finding.verdict for finding in found] == ["FAIL", "pass", "FAIL", "FAIL", "pass"]
    assert found[2].check == todo[2].name
    assert found[2].words == "the process of this check ended with status 3"


def test_errands_of_a_kernel_are_its_whole_suite():
    for quick in (True, False):
        kernel = candidates("norm")["torch"]
        alone = [errand.run() for errand in errands("norm", "torch", "cpu", quick=quick)]
        assert alone == check_kernel("norm", kernel, "cpu", quick=quick)
        todo = errands("attention", "sdpa", "cpu", quick=quick)
        assert len(todo) == len(checks_of("attention", quick=quick))
    assert len(checks_of("attention")) > len(checks_of("attention", quick=True)) > 20
    names = [finding.check for finding in check_kernel("attention", Raising(), quick=True)]
    leaks = [f"leak: {kind}" for kind in KINDS]
    rest = ["dropout", "other numbers"]
    rest += ["determinism: causal", "determinism: 1100 keys", "memory"]
    rest += [*HABITS, *QUESTIONS, "why_not"]
    assert names == [*SINGLE, *MIXED, *LARGE, *CORNERS, *LONG, *leaks, *rest]
    assert names == [check.name for check in checks_of("attention", quick=True)]
    with pytest.raises(ValueError, match="there is no op"):
        checks_of("convolution")


def test_failures_of_all_processes_are_counted_and_told(monkeypatch, capsys):
    monkeypatch.setattr(survey, "patients", lambda device: [Patient("norm", "torch", True)])
    monkeypatch.setattr(survey, "errands", lambda *_, quick: whoami(4))
    with pytest.raises(SystemExit) as leaving:
        cli.run(["kernels", "doctor", "--device", "cpu", "--jobs", "1"])
    assert leaving.value.code == 1
    printed = capsys.readouterr().out
    assert "2 passed   2 failed  <- auto" in printed
    (told,) = printed.splitlines()[2:]  # both failures say the same
    assert told.split(":")[0].strip() == "0" and told.endswith("(1 more as 0: 3)")


class Raising:
    """A kernel that serves everything, and raises when it is called."""

    name = "raising"

    def why_not(self, spec):
        return None

    def run(self, *arguments, **keywords):
        raise torch.OutOfMemoryError("no shared memory is left")


@pytest.mark.parametrize("op", ["attention", "norm", "glu"])
def test_a_kernel_that_raises_fails_its_checks_and_not_the_command(op):
    found = check_kernel(op, Raising(), quick=True)
    assert len(found) == len(checks_of(op, quick=True))
    for finding in found:
        assert finding.verdict == "FAIL", finding.check
        assert finding.words == "it raises OutOfMemoryError: no shared memory is left"


def test_without_triton_or_a_gpu_it_is_said_in_words(monkeypatch, capsys):
    assert "triton 3." in describe("cpu")
    hide(monkeypatch, "triton")
    assert describe("cpu") == f"CPU, torch {torch.__version__}, no triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["--device", "cuda"], ["--jobs", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["kernels", "doctor", *words])
        assert leaving.value.code == 2
        told = capsys.readouterr().err
        assert words[-1] in told and "Traceback" not in told


def test_a_gpu_is_shared_by_as_many_processes_as_cores_up_to_a_limit(monkeypatch):
    assert default_jobs("cpu") == 1
    for cores, jobs in ((2, 2), (None, 1), (96, MOST_JOBS)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert default_jobs("cuda") == jobs
