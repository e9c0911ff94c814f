"""`kernels check` on kernels of outsiders: right ones pass, each wrong one is told its fault."""

import subprocess
import sys

import pytest
import torch

from nanolm import cli
from nanolm.ops.contract import candidates
from nanolm.registry import KERNELS, OPS
from nanolm.tools.kernel_check.attention_cases import HARD, LARGE, MIXED, SINGLE
from nanolm.tools.kernel_check.attention_trials import trial_of
from nanolm.tools.kernel_check.conformance import check_case, check_kernel, checks_of
from nanolm.tools.kernel_check.trial import execute, reference
from tests.kernel_tools.outsider import Outsider, right
from tests.kernel_tools.outsiders import WRONG


def failures(op, kernel):
    return [f.words for f in check_kernel(op, kernel, quick=True) if f.verdict == "FAIL"]


def failures_up_to(words, op, kernel, at):
    """What is said of a kernel until these words are: the checks behind them tell no more. A kernel
    whose check is known is asked that one."""
    told = []
    for check in checks_of(op, quick=at is None):
        if at is not None and check.name != at:
            continue
        finding = check(kernel, "cpu")
        if finding.verdict == "FAIL":
            told.append(finding.words)
            if words in finding.words:
                break
    return told


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_wrong_kernel_is_told_its_fault(wrong):
    told = failures_up_to(wrong.words, wrong.op, wrong.kernel(), wrong.at)
    assert any(wrong.words in words for words in told), told


def test_twenty_faults_and_every_op_are_tried():
    assert len(WRONG) >= 20 and len({wrong.words for wrong in WRONG}) >= 20
    assert {wrong.op for wrong in WRONG} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_float64_in_float32_is_noted_and_fails_no_kernel(op):
    plain = right(op)

    def narrow(*given, **options):
        wide = given[0].dtype == torch.float64
        floats = [
            x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x
            for x in given
        ]
        if isinstance(options.get("residual"), torch.Tensor) and wide:
            options["residual"] = options["residual"].float()
        found = plain(*floats, **options)
        if not wide:
            return found
        if isinstance(found, torch.Tensor):
            return found.double()
        parts = [x.double() for x in found]
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)

    refuses = (lambda spec: "no bias" if spec.bias else None) if op == "attention" else None
    kernel = Outsider(narrow, refuses) if refuses else Outsider(narrow)
    found = check_kernel(op, kernel, quick=True)
    assert [f.words for f in found if f.verdict == "FAIL"] == []
    assert any("it computes in float32 what is float64" in f.words for f in found)


@pytest.mark.parametrize("op", OPS)
def test_a_right_outsider_passes(op):
    assert failures(op, Outsider(right(op))) == []
    assert checks_of(op)


OF_TORCH = [
    ("attention", "sdpa"),
    ("linear_cross_entropy", "chunked"),
    ("linear_cross_entropy", "torch"),
    ("norm", "torch"),
]
"""Kernels of this project that are neither definitions nor Triton's (flex: test_kernel_flex.py)."""


@pytest.mark.parametrize(("op", "name"), OF_TORCH)
def test_a_kernel_of_torch_passes_what_outsiders_are_asked(op, name):
    found = check_kernel(op, candidates(op)[name])
    assert [f for f in found if f.verdict == "FAIL"] == []
    assert sum(f.verdict == "refused" for f in found) <= 1


@pytest.mark.parametrize("name", ["many queries, one key", "one query, one key"])
@pytest.mark.parametrize("kernel", ["triton", "sdpa", "reference"])
def test_gradients_that_cancel_are_measured_by_their_terms(kernel, name):
    candidates("attention")
    kernel = KERNELS["attention"].get(kernel).build()
    assert check_case(kernel, name, HARD[name], "cpu").verdict in ("pass", "refused")


@pytest.mark.parametrize("kernel", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("name", ["large scores", "large scores in bfloat16"])
def test_scores_of_hundreds_are_as_exact_as_their_dtype(kernel, name):
    """What is left of terms that cancel is measured by them, beside weights of nearly 0 and 1."""
    assert check_case(candidates("attention")[kernel], name, LARGE[name], "cpu").verdict == "pass"


@pytest.mark.parametrize(
    ("name", "error", "verdict"),
    [
        ("large scores", 1e-3, "FAIL"),
        ("large scores in bfloat16", 1e-3, "pass"),  # which is why it does not stand alone
        ("large scores in bfloat16", 1.0, "FAIL"),
    ],
)
def test_large_scores_that_are_off_show_in_float32(name, error, verdict):
    def run(*given, scale, **options):
        return right("attention")(*given, scale=scale * (1 + error), **options)

    assert check_case(Outsider(run), name, LARGE[name], "cpu").verdict == verdict


def test_only_what_cancels_is_measured_by_its_terms():
    """The bound of every other trial is what it was: a share of the largest value."""
    wider = set()
    for name, case in (SINGLE | MIXED | HARD | LARGE).items():
        trial = trial_of(case)
        exact = execute(trial, reference("attention"), torch.float64, backward=True).tensors
        terms = trial.terms({leaf: x.detach().double() for leaf, x in trial.leaves.items()})
        for key, x in exact.items():
            dtype = case.dtype if key == "out" else trial.leaves[key[1:]].dtype
            largest = float(x.abs().max())
            if trial.size(largest, terms.get(key, 0.0), dtype) > largest:
                wider.add(name)
    assert wider == {
        "large scores", "large scores in bfloat16", "one query, one key", "many queries, one key",
        "window of one",
    }  # fmt: skip


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
        cli.run(
            ["kernels", "check", "--module", "shy_plugin", "--device", "cpu", "--apart", "false"]
        )
    assert leaving.value.code == 1
    assert "it passed no check" in capsys.readouterr().out


SCRIPT = "import sys; sys.path.remove(''); from nanolm.cli import main; main()"


@pytest.mark.parametrize(
    "start", [("-c", SCRIPT), pytest.param(("-m", "nanolm"), marks=pytest.mark.slow)]
)
def test_the_script_finds_a_module_in_the_current_folder(tmp_path, start):
    """`python -m nanolm` has the folder on its path, the script `nanolm` has not."""
    (tmp_path / "shy_plugin.py").write_text(PLUGIN)
    words = ["kernels", "check", "--module", "shy_plugin", "--device", "cpu"]
    command = [sys.executable, *start, *words]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "it passed no check" in found.stdout, found.stderr
