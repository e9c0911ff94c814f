"""What a trial allows, from the other side: five kernels that are nearly right, and one that is."""

import dataclasses

import pytest
import torch

from nanolm.tools.kernel_check.attention_cases import LARGE, SINGLE
from nanolm.tools.kernel_check.conformance import check_case, check_kernel, check_leak
from tests.kernel_tools.imprecise import CASES, IMPRECISE, RIGHT, Imprecise, measured

# Where each shows by most, and at least so many times what is allowed.
MARGINS = {
    "scores of 16-bit inputs summed in bfloat16": ("large scores in bfloat16", 2.5),
    "softmax without its maximum": ("large scores", float("inf")),
    "mask one too far, second tile of 64 keys": ("150 tokens, causal", 1e4),
    "log-sum-exp of 16-bit inputs kept in bfloat16": ("large scores in bfloat16", 20),
    "dq without 1 / sqrt(K)": ("head of 256", 1e5),
}


@pytest.mark.parametrize("name", IMPRECISE)
def test_a_step_that_is_nearly_right_is_seen_by_a_margin(name):
    trial, margin = MARGINS[name]
    assert measured(IMPRECISE[name], CASES[trial]) >= margin
    assert check_case(IMPRECISE[name], trial, CASES[trial], "cpu").verdict == "FAIL"


def test_the_same_steps_without_a_fault_take_a_part_of_what_is_allowed():
    shares = {name: measured(RIGHT, case) for name, case in CASES.items()}
    assert max(share for share in shares.values() if share is not None) < 0.2


class Narrow(Imprecise):
    """A kernel for 16-bit numbers alone, as FlashAttention is."""

    def why_not(self, spec):
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return "it multiplies 16-bit numbers"
        return super().why_not(spec)


def test_a_kernel_of_16_bits_is_tried_on_every_case_in_these():
    found = {f.check: f for f in check_kernel("attention", Narrow(), quick=True)}
    assert not [f for f in found.values() if f.verdict == "FAIL"]
    for name in ("causal", "window", "leak: documents", "determinism: causal", "1100 keys"):
        assert found[name].verdict == "pass"
    assert found["causal"].words == "in float16" and found["bfloat16"].words == ""


def test_what_a_kernel_of_16_bits_forgets_is_seen():
    steps = dataclasses.asdict(IMPRECISE["mask one too far, second tile of 64 keys"].steps)
    name = "150 tokens, causal"
    assert check_case(Narrow(**steps), name, LARGE[name], "cpu").verdict == "FAIL"


def test_forward_only_kernels_keep_float32():
    class Forward(Imprecise):
        def why_not(self, spec):
            return "it has no backward pass" if spec.phase == "train" else super().why_not(spec)

        def run(self, q, *given, **options):
            assert not q.requires_grad
            return super().run(q, *given, **options)

    found = check_case(Forward(), "causal", SINGLE["causal"], "cpu")
    assert (found.verdict, found.words) == ("pass", "forward only")
    assert check_leak(Forward(), "causal", "cpu").verdict == "pass"
