"""A kernel of an op that serves a part of what its trials ask is asked that part."""

import dataclasses

import pytest
import torch

from nanolm.ops import contract
from nanolm.ops.contract import candidates
from nanolm.registry import OPS
from nanolm.tools.kernel_check.conformance import checks_of
from nanolm.tools.kernel_check.op_narrowing import GIVEN_UP, SIZES, part_served, parts
from nanolm.tools.kernel_check.op_suites import op_trials
from nanolm.tools.kernel_check.op_trials import norm_trial
from nanolm.tools.kernel_check.trial import excess, execute
from tests.kernel_tools import wrong_narrow
from tests.kernel_tools.outsider import Outsider, right

OTHERS = [op for op in OPS if op != "attention"]


def test_every_option_of_a_spec_can_be_given_up():
    """One that `GIVEN_UP` and `SIZES` forgot would hide the others of a kernel that refuses it."""
    for name in ("LinearSpec", "CrossEntropySpec", "NormSpec", "RotarySpec", "GluSpec",
                 "SymmetricProductSpec"):  # fmt: skip
        fields = {f.name for f in dataclasses.fields(getattr(contract, name))}
        options = fields - {"dtype", "device", "phase"} - set(SIZES.get(name, ()))
        assert {option.field for option in GIVEN_UP.get(name, ())} == options


KERNELS = [(op, "reference") for op in OTHERS]
KERNELS += [("norm", "torch"), ("linear_cross_entropy", "torch")]


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_right_kernels_are_right_on_every_part(op, name):
    """In 16 bits too, and what is made is what was asked about."""
    kernel = candidates(op)[name]
    for trial in op_trials(op):
        for spec, part in parts(trial):
            moved = "multiples" in part.words  # of these one step, and nothing else
            if part.phase != "train" or (moved and part.words != "at multiples of 64"):
                continue
            made = part.of(trial)
            assert made.spec == spec
            if not part.changes or made.leaves[next(iter(made.leaves))].numel() > 9999:
                continue  # the whole is asked elsewhere
            if kernel.why_not(spec) is not None:
                continue
            off = excess(made, execute(made, kernel, backward=True))
            assert max(off.values()) < 1, (trial.name, part.words, off)


def test_the_largest_part_comes_first():
    trial = norm_trial(
        "layernorm", 3, 8, bias=True, residual=True, dtype=torch.float32, device="cpu"
    )
    words = [part.words for _, part in parts(trial)]
    assert words[0] == "" and words[1:3] == ["in bfloat16", "in float16"]
    assert words[3] == "forward only" and words[9] == "at multiples of 64"
    assert words[9 * 4] == "without a residual" and len(words) == 9 * 4 * 8
    kernel = Outsider(None, lambda spec: "no residual" if spec.residual else None)
    part, reason = part_served(kernel, trial)
    assert (part.words, reason) == ("without a residual", "")
    assert part_served(Outsider(None, lambda spec: "never"), trial) == (None, "never")


@pytest.mark.parametrize("again", [0, 1, 2])
def test_what_was_done_to_a_trial_is_done_to_its_part(again):
    """Strides, more axes and the hint stay when a trial is made with other arguments."""
    named = {trial.name: trial for trial in op_trials("norm")}
    endings = (" strides", " with an axis more", " around 30 torch.float32")
    found = next(trial for name, trial in named.items() if name.endswith(endings[again]))
    part, _ = part_served(Outsider(None, wrong_narrow.rmsnorm_alone), found)
    made = part.of(found)
    x, whole = made.leaves["x"], found.leaves["x"]
    assert made.spec.kind == "rmsnorm"
    assert (x.shape, x.stride(), made.hint) == (whole.shape, whole.stride(), found.hint)


NARROW = [
    ("norm", wrong_narrow.rmsnorm_alone),
    ("glu", wrong_narrow.forward_alone),
    ("rotary", wrong_narrow.bfloat16_alone),
    ("linear", wrong_narrow.float16_alone),
    ("symmetric_product", wrong_narrow.forward_alone),
    ("linear_cross_entropy", wrong_narrow.plain_losses_with_z),
    ("linear_cross_entropy", wrong_narrow.forward_alone),
    ("norm", wrong_narrow.whole_blocks),
    ("glu", wrong_narrow.whole_blocks),
    ("rotary", wrong_narrow.whole_blocks),
    ("symmetric_product", wrong_narrow.whole_blocks),
    ("linear_cross_entropy", wrong_narrow.whole_blocks),
]


@pytest.mark.parametrize(("op", "refuses"), NARROW)
def test_a_right_narrow_kernel_passes_nearly_all(op, refuses):
    """What it is not asked are twins: parts that are trials of their own."""
    run = right(op) if refuses is not wrong_narrow.forward_alone else torch.no_grad()(right(op))
    found = [check(Outsider(run, refuses), "cpu") for check in checks_of(op)]
    verdicts = [finding.verdict for finding in found]
    assert "FAIL" not in verdicts, [f for f in found if f.verdict == "FAIL"]
    assert verdicts.count("refused") <= len(found) // 3
    options = [f.words for f in found if f.check == "other options" and f.verdict == "refused"]
    if refuses is wrong_narrow.rmsnorm_alone:
        assert options == ["of the two it serves what they have in common"]
    for name in ("answers", "evaluation", "overlapping", "determinism", "released"):
        assert {f.verdict for f in found if f.check == name} == {"pass"}
    for name in (
        "frozen",
        "layout",
        "unchanged",
        "accumulated",
        "twice",
    ):  # without a backward pass
        due = "refused" if refuses is wrong_narrow.forward_alone else "pass"
        assert {f.verdict for f in found if f.check == name} == {due}


def test_a_part_is_asked_once():
    """`bfloat16_alone` has the float32 trials' twins among the trials."""
    found = [
        check(Outsider(right("glu"), wrong_narrow.bfloat16_alone), "cpu")
        for check in checks_of("glu")
        if check.name in ("swiglu 3x127 torch.float32", "swiglu 1x4500 torch.float32")
    ]
    assert [(f.verdict, f.words) for f in found] == [
        ("refused", "it has tiles of bfloat16"),
        ("pass", "in bfloat16"),
    ]


def test_exact_logits_stay_exact_in_wide_layers():
    """A kernel of whole blocks that keeps logits in 16 bits is right on them too."""
    exact = [trial for trial in op_trials("linear_cross_entropy") if "exact" in trial.name]
    for trial in exact:
        for width in (16, 64, 1024):
            leaves = trial.again(width=width, vocab_size=1024).leaves
            logits = leaves["hidden"].float() @ leaves["weight"].float().T
            assert logits.abs().max() > 1
            if trial.spec.dtype != torch.float32:
                assert torch.equal(logits.to(trial.spec.dtype).float(), logits)
    assert len(exact) >= 5
