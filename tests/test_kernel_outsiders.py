"""`kernels check` on kernels of outsiders: right ones pass, each wrong one is told its fault."""

import subprocess
import sys

import pytest

from nanolm import cli
from nanolm.ops.contract import candidates
from nanolm.registry import KERNELS, OPS
from nanolm.tools.kernel_check.attention_trials import HARD
from nanolm.tools.kernel_check.conformance import check_case, check_kernel, checks_of
from tests.kernel_tools.outsiders import WRONG, Outsider, right


def failures(op, kernel):
    return [f.words for f in check_kernel(op, kernel, quick=True) if f.verdict == "FAIL"]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_wrong_kernel_is_told_its_fault(wrong):
    told = failures(wrong.op, wrong.kernel())
    assert any(wrong.words in words for words in told), told


def test_twenty_faults_and_every_op_are_tried():
    assert len(WRONG) >= 20 and len({wrong.words for wrong in WRONG}) >= 20
    assert {wrong.op for wrong in WRONG} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_a_right_outsider_passes(op):
    assert failures(op, Outsider(right(op))) == []
    assert checks_of(op)


@pytest.mark.parametrize("name", ["many queries, one key", "one query, one key"])
@pytest.mark.parametrize("kernel", ["triton", "sdpa", "reference"])
def test_gradients_that_cancel_are_measured_by_their_terms(kernel, name):
    candidates("attention")
    kernel = KERNELS["attention"].get(kernel).build()
    assert check_case(kernel, name, HARD[name], "cpu").verdict in ("pass", "refused")


PLUGIN = """
from nanolm.ops import kernel

@kernel("norm")
class Shy:
    name = "shy"

    def why_not(self, spec):
        return "it is shy"

    def run(self, *arguments, **options):
        raise NotImplementedError
"""


def test_a_kernel_that_refuses_everything_has_not_passed(tmp_path, monkeypatch, capsys):
    (tmp_path / "shy_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(KERNELS["norm"], "_entries", dict(KERNELS["norm"]._entries))
    with pytest.raises(SystemExit) as leaving:
        cli.run(["kernels", "check", "--module", "shy_plugin", "--device", "cpu"])
    assert leaving.value.code == 1
    assert "it passed no check" in capsys.readouterr().out


def test_the_script_finds_a_module_in_the_current_folder(tmp_path):
    """`python -m nanolm` has the folder on its path, the script `nanolm` has not."""
    (tmp_path / "shy_plugin.py").write_text(PLUGIN)
    script = "import sys; sys.path.remove(''); from nanolm.cli import main; main()"
    words = ["kernels", "check", "--module", "shy_plugin", "--device", "cpu"]
    for start in (["-c", script], ["-m", "nanolm"]):
        command = [sys.executable, *start, *words]
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert "it passed no check" in found.stdout, found.stderr
