"""A kernel that refuses a feature is asked about all others together."""

import dataclasses

import pytest
import torch

from nanolm.registry import OPS
from nanolm.tools.kernel_check.attention_cases import HARD, LARGE, MIXED, SINGLE, Case
from nanolm.tools.kernel_check.attention_corners import CORNERS
from nanolm.tools.kernel_check.attention_trials import spec_of, trial_of
from nanolm.tools.kernel_check.conformance import check_case, checks_of
from nanolm.tools.kernel_check.diagnosis import fault
from nanolm.tools.kernel_check.narrowing import GIVEN_UP, SHAPES, narrowed, present, without
from nanolm.tools.kernel_check.safety import watched_trials
from nanolm.tools.kernel_check.serving import Serving
from tests.kernel_tools import wrong_narrow
from tests.kernel_tools.outsider import Outsider, right

CASES = SINGLE | MIXED | LARGE | HARD | CORNERS
REFUSALS = {
    "biases": lambda spec: "it has no bias" if spec.bias else None,
    "windows and soft-caps": lambda spec: (
        "it has neither" if spec.window is not None or spec.softcap else None
    ),
    "orders and prefixes": lambda spec: "no" if spec.masks & {"order", "prefix"} else None,
    "all but causal, padded and packed rows": lambda spec: (
        "no" if spec.masks - {"lengths", "documents"} or spec.window or spec.bias or spec.softcap
        else None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_the_part_is_served_and_nothing_was_left_out_without_need(name):
    def serves(case):
        return REFUSALS[name](spec_of(case, "cpu")) is None

    parts = 0
    for case in CASES.values():
        found = narrowed(case, serves)
        if serves(case):
            continue
        if found is None:
            names = present(case)
            assert not names or not any(
                serves(without(case, names[:i] + names[i + 1 :])) for i in range(len(names))
            )
            continue
        part, left_out = found
        parts += 1
        assert serves(part) and without(case, left_out) == part
        for kept in left_out:  # each had to go
            assert not serves(without(case, [other for other in left_out if other != kept]))
    assert parts >= 4


@pytest.mark.parametrize("name", CASES)
def test_a_part_is_a_problem_like_others(name):
    """The definition is right on it, and unusual numbers stay where they are the point."""
    for feature in present(CASES[name]):
        part = without(CASES[name], [feature])
        assert part.numbers == CASES[name].numbers
        if part.n_keys < 100 and feature in ("a bias", "documents", "an order"):
            assert fault(Outsider(right("attention")), trial_of(part, "cpu")) is None


def test_every_feature_of_a_spec_can_be_given_up():
    """A mask, bias or soft-cap that a spec names and `GIVEN_UP` forgot would hide the others."""
    everything = Case(
        n_kv_heads=1, n_queries=11, causal=True, window=7, lengths=True, documents=True,
        prefix=True, order="loose", bias="dense", softcap=3.0,
    )  # fmt: skip
    assert without(everything, [*SHAPES, *GIVEN_UP]) == Case()
    spec = spec_of(everything, "cpu")
    plain = spec_of(Case(), "cpu")
    differing = {
        f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(plain, f.name)
    }
    assert differing == {"n_kv_heads", "cross", "causal", "window", "masks", "bias", "softcap"}


def only_padded_and_packed(spec):
    return REFUSALS["all but causal, padded and packed rows"](spec)


def narrow(fault):
    """A kernel of causal, padded and packed rows, with a fault."""
    plain = right("attention")

    def run(q, k, v, mask, **options):
        out = plain(q, k, v, mask, **options)
        return out + 1 if fault(q, k, mask) else out

    return Outsider(run, only_padded_and_packed)


FAULTS = {
    "one query beside many keys": lambda q, k, m: q.shape[1] == 1 < k.shape[1],
    "lengths beside documents": lambda q, k, m: (
        m.documents is not None and m.key_lengths is not None
    ),
    "documents of 32 bits": lambda q, k, m: (
        m.documents is not None and m.documents.dtype == torch.int32
    ),
    "documents of queries and keys": lambda q, k, m: (
        m.key_documents is not None and q.shape[1] != k.shape[1]
    ),
    "autocast": lambda q, k, m: torch.is_autocast_enabled("cpu"),
    "queries before all keys": lambda q, k, m: q.shape[1] > k.shape[1] > 1 and m.causal,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_narrow_kernel_is_asked_what_it_serves(name):
    kernel = narrow(FAULTS[name])
    cases = [check for check in checks_of("attention") if check.name in CASES]
    assert any(check(kernel, "cpu").verdict == "FAIL" for check in cases)


def test_a_right_narrow_kernel_passes_and_is_told_what_was_left_out():
    kernel = narrow(lambda *_: False)
    found = check_case(kernel, "int32 masks", CASES["int32 masks"], "cpu")
    assert (found.verdict, found.words) == ("pass", "without an order and a prefix")
    found = check_case(kernel, "alibi", CASES["alibi"], "cpu")
    assert found.verdict == "refused"


HOMES = {
    "heads of 64 or 128": (wrong_narrow.heads_of_64_or_128, {"width": 64}, 122),
    "heads of 32 and no gradients": (
        lambda spec: None if spec.head_dim == 32 and spec.phase != "train" else "no",
        {"width": 32}, 112,
    ),
    "causal, in 16 bits": (wrong_narrow.causal_bfloat16, {"width": 64, "causal": True}, 113),
    "as many heads of keys": (wrong_narrow.as_many_key_heads, {}, 119),
    "no keys of their own": (lambda spec: "no" if spec.cross else None, {}, 117),
}  # fmt: skip


@pytest.mark.parametrize("name", HOMES)
def test_a_kernel_of_few_layers_is_asked_all_that_others_are(name):
    refuses, home, n_passed = HOMES[name]
    run = right("attention")
    kernel = Outsider(torch.no_grad()(run) if "no gradients" in name else run, refuses)
    assert Serving(kernel, "cpu").home == home
    found = [check(kernel, "cpu") for check in checks_of("attention")]
    assert not [finding for finding in found if finding.verdict == "FAIL"]
    assert sum(finding.verdict == "pass" for finding in found) >= n_passed


def test_the_sanitizer_watches_a_kernel_at_home():
    """In each phase as itself."""
    kernel = Outsider(None, wrong_narrow.heads_of_64_or_128)
    watched = [problem.taken(kernel) for problem in watched_trials("attention")]
    assert None not in watched
    assert {trial.spec.head_dim for trial in watched} == {64}
    phases = [trial.spec.phase for trial in watched]
    assert {phase: phases.count(phase) for phase in phases} == {
        "train": 26, "prefill": 26, "decode": 1
    }  # fmt: skip


@pytest.mark.parametrize("op", ["attention", "norm"])
def test_the_sanitizer_watches_a_kernel_of_16_bits(op):
    kernel = Outsider(None, wrong_narrow.bfloat16_alone)
    watched = [problem.taken(kernel) for problem in watched_trials(op)]
    taken = [trial for trial in watched if trial is not None]
    assert {trial.spec.dtype for trial in taken} == {torch.bfloat16}
    assert len(taken) >= 0.8 * len(watched)


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_that_refuses_everything_passes_nothing(op):
    found = [check(Outsider(None, lambda spec: "never"), "cpu") for check in checks_of(op)]
    assert {(finding.verdict, finding.words) for finding in found} == {("refused", "never")}


def test_a_kernel_of_nothing_is_refused_as_itself():
    kernel = Outsider(None, lambda spec: f"not {spec.head_dim}")
    assert Serving(kernel, "cpu")(Case(width=20)) == (None, "not 20")


def test_unusual_numbers_are_not_asked_without_what_they_number():
    assert present(CASES["large documents"]) == []
    assert present(CASES["places shared"]) == []
    assert "documents" in present(CASES["masks with gaps"])
