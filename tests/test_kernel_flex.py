"""FlexAttention as a candidate: right for every mask that it serves, refused where it is not."""

import pytest
import torch

from nanolm.errors import UserError
from nanolm.ops.contract import AUTO, KERNELS, AttentionSpec, candidates, choose
from nanolm.ops.masks import Mask
from nanolm.tools.kernel_check.attention_cases import HARD, SINGLE
from nanolm.tools.kernel_check.conformance import check_case, check_kernel
from nanolm.tools.kernel_check.trial import distance, reference

CASES = {
    name: (SINGLE | HARD)[name]
    for name in (
        "lengths",
        "strict order",
        "everything at once",
        "T5 decoder over a cache",
        "packed causal GQA",
        "soft-cap under a learned bias",
    )
}


def flex():
    candidates("attention")
    return KERNELS["attention"].get("flex").build()


def spec(**changes):
    return AttentionSpec(**{"n_heads": 2, "n_kv_heads": 2, "head_dim": 16, **changes})


@pytest.mark.parametrize("name", CASES)
def test_flex_is_the_reference_in_inference(name):
    finding = check_case(flex(), name, CASES[name], "cpu")
    assert finding.verdict == "pass" and "forward only" in finding.words, finding


@pytest.mark.slow
def test_flex_passes_the_conformance_suite():
    findings = check_kernel("attention", flex(), "cpu")
    assert not [f for f in findings if f.verdict == "FAIL"]
    assert sum(f.verdict == "pass" for f in findings) > 30


def test_flex_would_refuse_a_gradient_on_a_cpu_itself():
    q, k, v = torch.randn(3, 1, 9, 2, 16)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex().run(q.requires_grad_(), k, v, Mask(causal=True), scale=0.25)


def test_flex_returns_the_log_sum_exp():
    q, k, v = torch.randn(3, 1, 9, 2, 16, generator=torch.Generator().manual_seed(0))
    mask = Mask(key_lengths=torch.tensor([5]), order=torch.arange(9)[None], strict=True)
    found = flex().run(q, k, v, mask, scale=0.25, return_lse=True)
    expected = reference("attention").run(q, k, v, mask, scale=0.25, return_lse=True)
    assert distance(found.out, expected.out) < 1e-5 and distance(found.lse, expected.lse) < 1e-5
    assert (found.out[0, 0] == 0).all()  # the first query of the order sees nothing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "no backward pass on a CPU"),
        ({"phase": "prefill", "dropout": 0.1}, "no dropout"),
        ({"phase": "decode", "dtype": torch.float64}, "no torch.float64"),
        ({"device": "cuda", "bias": "bucket"}, "atomically"),
        ({"device": "cuda", "head_dim": 8}, "at least 16 wide"),
        ({"device": "mps"}, "not on mps"),
    ],
)
def test_flex_says_what_it_cannot_do(changes, words):
    assert words in flex().why_not(spec(**changes))


def test_flex_is_taken_by_name_only():
    assert "flex" not in AUTO["attention"]
    with pytest.raises(UserError, match="no backward pass on a CPU"):
        choose("attention", spec(), "flex")
    for changes in ({"phase": "prefill"}, {"device": "cuda"}, {"device": "cuda", "bias": "alibi"}):
        assert choose("attention", spec(**changes), "flex").kernel.name == "flex"
        assert choose("attention", spec(**changes)).kernel.name != "flex"
