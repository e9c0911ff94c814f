"""The same bits twice: what `kernels check` says of kernels whose gradients vary, and when it lets
them."""

import itertools
import logging

import pytest
import torch

from nanolm import cli
from nanolm.errors import UserError
from nanolm.ops.contract import AttentionSpec, GluSpec, Kernels, instance, why_it_varies
from nanolm.registry import KERNELS
from nanolm.tools.kernel_check.conformance import check_kernel, determinism_check
from tests.kernel_tools.outsider import Outsider, right

REASON = "three programs add to one gradient"


class InAnyOrder(torch.autograd.Function):
    """The identity, whose gradient comes in three shares, added in an order that another call
    changes: what atomic additions do."""

    turns = itertools.count()

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        shares = [grad * 0.3, grad * 0.6, grad * 0.1]
        turn = next(InAnyOrder.turns) % 3
        first, second, third = shares[turn:] + shares[:turn]
        return first + second + third


def restless(op="attention", **declared):
    """A right kernel whose first input's gradient is added up in any order."""

    def run(x, *given, **options):
        return right(op)(InAnyOrder.apply(x), *given, **options)

    kernel = Outsider(run)
    vars(kernel).update(declared)
    return kernel


def determinism(kernel):
    """What the suite finds about bits."""
    return [determinism_check(name)(kernel, "cpu") for name in ("causal", "1100 keys")]


def test_gradients_that_vary_and_say_so_are_noted():
    found = check_kernel("attention", restless(varies_on={"cpu": REASON}), quick=True)
    assert not [f for f in found if f.verdict == "FAIL"]
    noted = [f for f in found if f.verdict == "note"]
    assert [f.check for f in noted] == ["determinism: causal", "determinism: 1100 keys"]
    assert all(f.words.startswith("dq differ") and f.words.endswith(REASON) for f in noted)


@pytest.mark.parametrize("declared", [{}, {"varies_on": {"cuda": REASON}}])
def test_gradients_that_vary_and_do_not_say_so_fail(declared):
    found = determinism(restless(**declared))
    assert [f.verdict for f in found] == ["FAIL", "FAIL"]
    for finding in found:
        assert "dq differ between two runs" in finding.words
        assert 'varies_on = {"cpu": "…"}' in finding.words


def test_outputs_that_vary_are_never_excused():
    turns = itertools.count(1)

    def run(*given, **options):
        return right("attention")(*given, **options) * (1 + 1e-6 * next(turns))

    kernel = Outsider(run)
    kernel.varies_on = {"cpu": REASON}
    for finding in determinism(kernel):
        assert finding.verdict == "FAIL" and "excuses gradients, not outputs" in finding.words


def test_a_kernel_that_repeats_passes_whatever_it_says():
    kernel = Outsider(right("attention"))
    kernel.varies_on = {"cpu": REASON}
    assert [f.verdict for f in determinism(kernel)] == ["pass", "pass"]


@pytest.mark.parametrize("wrong", ["atomics", ["cuda"], {"cuda": ""}, {"cuda": None}])
def test_a_declaration_is_a_device_and_a_sentence(wrong):
    class Kernel(Outsider):
        varies_on = wrong

        def __init__(self):
            super().__init__(right("glu"))

    with pytest.raises(UserError, match="varies_on is"):
        instance("glu", Kernel)


@pytest.mark.parametrize(("phase", "told"), [("train", True), ("prefill", False)])
def test_the_log_of_a_run_says_that_gradients_vary(caplog, phase, told):
    caplog.set_level(logging.INFO)
    kernels = Kernels({"attention": "sdpa"}, device="cuda", phase=phase)
    kernel = kernels.choose("attention", AttentionSpec, n_heads=2, n_kv_heads=2, head_dim=16)
    assert (why_it_varies(kernel, "cuda") in caplog.text) == told
    assert why_it_varies(kernel, "cpu") is None


def test_a_log_without_any_such_kernel_is_what_it_was(caplog):
    caplog.set_level(logging.INFO)
    Kernels({"glu": "reference"}).choose("glu", GluSpec, kind="swiglu", width=8)
    assert caplog.messages == ["glu: reference"]


PLUGIN = """
from nanolm.ops import kernel
from tests.test_kernel_repeats import restless

for name, declared in (("open", {{"varies_on": {{"cpu": "shares"}}}}), ("silent", {{}})):
    made = restless("glu", name=name, **declared)
    if name in {names}:
        kernel("glu")(lambda: made)
"""


@pytest.mark.parametrize(
    ("names", "status", "words"),
    [
        (["open"], None, "0 failed, 0 refused, 1 noted"),
        (["open", "silent"], 1, 'write down why: varies_on = {"cpu": "…"}'),
    ],
)
def test_the_command_tells_both(tmp_path, monkeypatch, capsys, names, status, words):
    module = f"restless_{len(names)}"
    (tmp_path / f"{module}.py").write_text(PLUGIN.format(names=names))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(KERNELS["glu"], "_entries", dict(KERNELS["glu"]._entries))
    left = None
    try:
        cli.run(["kernels", "check", "--module", module, "--device", "cpu"])
    except SystemExit as leaving:
        left = leaving.code
    assert left == status
    assert words in " ".join(capsys.readouterr().out.split())
