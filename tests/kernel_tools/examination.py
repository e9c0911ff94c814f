"""What a kernel is asked before it is believed: the quick trials and tests that concern it.

A question runs one trial under the sanitizer, or one test of the files beside this folder, and says
by what it saw that something is wrong, or None. `tests/kernel_tools/mutants.py` puts the questions
to kernels that are wrong, `tests/kernel_tools/coverage.py` counts the lines that they reach.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nanolm.tools.kernel_check.attention_cases import HARD, MIXED, SINGLE, Case
from nanolm.tools.kernel_check.op_suites import TRIALS, op_trials
from nanolm.tools.kernel_check.trial import Trial
from tests import test_kernel_attention as attention_tests
from tests import test_kernel_dropout as dropout_tests
from tests import test_kernel_edges as edge_tests
from tests import test_kernel_far as far_tests
from tests import test_kernel_operators as operator_tests
from tests import test_kernel_overflow as overflow_tests
from tests import test_kernel_ranges as range_tests
from tests.kernel_tools.covering import covering_cases
from tests.kernel_tools.mutation import Mutant
from tests.kernel_tools.question import (
    EDGES,
    TRAINED,
    WIDTHS,
    Question,
    case_question,
    judged,
    of_far,
    of_integers,
    of_ranges,
    of_wrapper,
    small,
    test_of,
    tiled,
)


def attention() -> Iterator[Question]:
    """Single features in a few tiles; rows, heads and groups; pairs of modes and hard combinations;
    what is not a trial."""
    yield tiled(case_question("plain", small(Case())), 16, 16)
    few = {"n_queries": 5, "n_keys": 7, "width": 20}
    rows = Case(n_rows=2, n_heads=2, n_kv_heads=1, **few, bias="dense_by_row", causal=True)
    yield tiled(case_question("rows", rows), 16, 32)
    groups = Case(n_rows=1, n_heads=4, n_kv_heads=2, **few, bias="dense_by_head")
    yield tiled(case_question("groups", groups), 32, 16)
    for name, case in (SINGLE | MIXED).items():
        if name not in ("plain", "grouped heads", "learned slopes"):
            sizes = {"n_rows": 2} if case.lengths or case.documents or case.prefix else {}
            yield tiled(case_question(name, small(case, **sizes)), 16, 16)
    for number, case in enumerate(covering_cases()[::4]):
        shape = ((16, 32), (32, 16))[number % 2]
        yield tiled(case_question(f"pairs {number}", case), *shape)
    for name in (
        "everything at once", "query stream", "packed causal GQA", "prefix and padding",
        "one query, many keys", "queries before all keys", "head of 20", "window of 31",
        "window of 32", "window of 33",
    ):  # fmt: skip
        yield tiled(case_question(name, HARD[name]), 16, 16)
    alone = {"n_rows": 1, "n_heads": 1, "n_kv_heads": 1, "n_queries": 70, "n_keys": 75}
    for name, options in (("causal", {"causal": True}), ("window", {"window": 50})):
        for m, n in ((16, 32), (32, 16)):
            yield tiled(case_question(f"70 queries, {name}", Case(**alone, **options)), m, n)
    table = Case(n_rows=1, n_heads=1, n_kv_heads=1, n_queries=31, n_keys=13, bias="bucket")
    yield tiled(case_question("table, more queries than keys", table), 16, 16)
    for name in range_tests.MASKS:
        for of_keys in (True, False):
            test = range_tests.test_ranges_are_those_of_the_mask
            yield test_of(test, name, of_keys, about=f"{name} {EDGES}", concerns=of_ranges)
    for of_keys in (True, False):
        for name in range_tests.OTHERS:
            test = range_tests.test_beside_other_conditions_no_more_is_visited_than_by_a_scan
            yield test_of(test, name, of_keys, about=f"{name} {EDGES}", concerns=of_ranges)
        test = range_tests.test_ranges_of_a_row_beyond_32_bits
        yield test_of(test, of_keys, about=WIDTHS, concerns=of_ranges)
    yield tiled(case_question("no lse", small(SINGLE["causal"]), lse=False), 16, 16)
    tests = attention_tests
    for test, about in (
        (tests.test_rows_that_see_nothing_give_zero_and_no_gradient, "inf lengths"),
        (tests.test_tiles_that_a_mask_rules_out_are_not_visited, "range"),
        (tests.test_order_of_programs_does_not_matter, ""),
    ):
        yield tiled(test_of(test, about=about), 16, 16)
    test = dropout_tests.test_the_kernel_keeps_what_the_definition_says
    yield tiled(test_of(test, (1, 2, 33, 48), dropout_tests.SEED, about="dropout keep"), 16, 16)
    for bias in dropout_tests.BIASES:
        test = dropout_tests.test_every_gradient_is_that_of_what_the_forward_pass_kept
        yield tiled(test_of(test, bias, about=f"dropout keep {bias}"), 16, 16)
    for bias in ("none", "bucket", "dense_by_head"):
        yield test_of(tests.test_gradcheck, bias, about=f"accumulate {bias.partition('_')[0]}")
    for bias in ("bucket", "dense_by_head"):
        about = f"accumulate wide {bias.partition('_')[0]}"
        yield tiled(test_of(tests.test_float64_is_as_exact_as_float64, bias, about=about), 16, 16)
    test = tests.test_whole_tiles_of_narrow_heads_read_nothing_beside_them
    yield tiled(test_of(test, about="column width checked"), 16, 16)
    for shape in ((7,), (2, 5, 1), (2, 1, 1, 1), (1, 2, 5, 7)):
        test = edge_tests.test_a_dense_bias_of_any_shape_and_layout_has_its_gradient
        yield test_of(test, shape, about="dense bias stride")
    for dtype in (torch.float32, torch.bfloat16):
        for hidden in ("lowest", "-inf"):
            test = edge_tests.test_a_bias_that_hides_a_whole_row_is_zero_in_every_kernel
            yield test_of(test, "triton", hidden, dtype)
    yield test_of(edge_tests.test_without_any_key_attention_is_zero, "triton")
    yield test_of(edge_tests.test_dropout_of_one_drops_everything, "triton")
    yield from far("test_dense_bias", "triton", 4)
    yield from far("test_queries_keys_and_values", "triton", 4)
    for condition in ("documents", "order"):
        test = far_tests.test_numbers_of_many_keys
        yield test_of(test, condition, about=f"int64 {condition}", concerns=of_far)
    yield from many_heads("triton")
    yield from overflow(*overflow_tests.ATTENTION)
    yield from operators("attention", "attention_backward")


def decode() -> Iterator[Question]:
    """Few queries against many keys."""
    for name, case in attention_tests.DECODE.items():
        served = dataclasses.replace(case, phase="decode")
        yield case_question(name, served, "triton_decode")
    yield test_of(edge_tests.test_without_any_key_attention_is_zero, "triton_decode")
    for hidden in ("lowest", "-inf"):
        test = edge_tests.test_a_bias_that_hides_a_whole_row_is_zero_in_every_kernel
        yield test_of(test, "triton_decode", hidden, torch.float32)
    yield from far("test_dense_bias", "triton_decode", 4)
    yield from far("test_queries_keys_and_values", "triton_decode", 4)
    yield from many_heads("triton_decode")
    yield from overflow("decode")
    yield from operators("attention_decode")


def far(test: str, name: str | None, n_axes: int) -> Iterator[Question]:
    """Views whose strides pass 2^31."""
    function = getattr(far_tests, test)
    about = "bias dense" if "bias" in test else ""
    for axis in range(n_axes):
        arguments = (axis,) if name is None else (name, axis)

        def run(*arguments: Any) -> None:
            function(far_tests.untouched(), *arguments)

        run.__name__ = test
        yield test_of(run, *arguments, about=about, concerns=of_far)


def many_heads(name: str) -> Iterator[Question]:
    """A view whose heads lie further apart than 32 bits reach, though its strides are small."""

    def run(name: str) -> None:
        far_tests.test_heads_that_are_too_many_for_32_bits(far_tests.untouched(), name)

    run.__name__ = "test_heads_that_are_too_many_for_32_bits"
    yield test_of(run, name, concerns=of_far)


def overflow(*names: str) -> Iterator[Question]:
    """Integers that are too short for an index times a stride."""
    for name in names:
        test = overflow_tests.test_indices_times_strides_are_64_bits_wide
        yield test_of(test, name, about=WIDTHS, concerns=of_integers)


def operators(*names: str) -> Iterator[Question]:
    """How PyTorch sees them."""
    for name in names:
        test = operator_tests.test_operator_is_registered_as_pytorch_wants_it
        yield test_of(test, name, concerns=of_wrapper)
    yield test_of(operator_tests.test_flops_are_counted, about="flops", concerns=of_wrapper)
    for name in names:
        for layout in operator_tests.LAYOUTS if name in TRAINED else ():
            test = operator_tests.test_gradients_arrive_in_any_layout
            yield test_of(test, name, layout, about="contiguous grad", concerns=of_wrapper)
    test = operator_tests.test_autocast_casts_products_to_the_dtype_of_its_region
    yield test_of(test, torch.float16, about="cast dtype", concerns=of_wrapper)
    for grad in (True, False):
        test = operator_tests.test_autocast_leaves_float64_as_it_is
        yield test_of(test, grad, about="cast dtype", concerns=of_wrapper)


def alone(op: str) -> Iterator[Question]:
    """One leaf that learns, and the others do not."""
    test = operator_tests.test_what_learns_alone_has_the_gradient_that_it_has_among_others
    yield test_of(test, op, about="needs grad", concerns=of_wrapper)


def trials(op: str) -> Iterator[Question]:
    """The trials of an op."""
    for trial in [*sorted(op_trials(op), key=numel), *wide_trials(op)]:
        make = functools.partial(lambda trial: trial, trial)
        yield Question(trial.name, functools.partial(judged, op, "triton", make))
    yield from overflow(op)


def wide_trials(op: str) -> Iterator[Trial]:
    """In float64, in which sums are taken then: as exact as that."""
    for trial in TRIALS[op](0, {"dtype": torch.float64, "device": "cpu"}):
        yield dataclasses.replace(trial, computes=torch.float64, dtypes={})


def numel(trial: Trial) -> int:
    """Numbers in a trial: the smaller ones are asked first."""
    return sum(x.numel() for x in trial.leaves.values())


def norm() -> Iterator[Question]:
    """Rows of several widths, dtypes and sizes."""
    yield from trials("norm")
    yield from alone("norm")
    yield from operators("norm", "norm_backward")


def rotary() -> Iterator[Question]:
    """Heads of several widths, near and far."""
    yield from trials("rotary")
    yield from far("test_rotary", None, 4)
    yield from operators("rotary")


def glu() -> Iterator[Question]:
    """Both gates."""
    yield from trials("glu")
    yield from operators("glu", "glu_backward")


def best_logits() -> None:
    """Of equal logits the first, in blocks of 16."""
    with pytest.MonkeyPatch.context() as patch:
        test = edge_tests.test_the_best_logit_is_the_first_of_the_largest_in_whatever_block
        test(patch, "triton")


def cross_entropy() -> Iterator[Question]:
    """Options alone and together, targets inside and outside the vocabulary."""
    yield from trials("linear_cross_entropy")
    for wrong in (7, -1):
        test = edge_tests.test_a_target_outside_the_vocabulary_is_nan_in_every_kernel
        yield test_of(test, "triton", wrong)
    yield test_of(best_logits)
    yield test_of(
        edge_tests.test_sums_of_16_bit_logits_are_taken_in_float32, "triton", torch.float16
    )
    yield from alone("loss")
    for learning in ((), (0,), (1,), (2,)):
        test = operator_tests.test_flops_of_the_loss_are_those_of_the_gradients_that_are_taken
        yield test_of(test, learning, about="flops needs", concerns=of_wrapper)
    yield from operators("linear_cross_entropy")


def symmetric_product() -> Iterator[Question]:
    """Tall, wide and far matrices."""
    yield from trials("symmetric_product")
    yield from far("test_symmetric_product", None, 3)
    yield from operators("symmetric_product")


ALL = {
    questions.__name__: questions
    for questions in (attention, decode, norm, rotary, glu, cross_entropy, symmetric_product)
}
CONCERNED = {
    "attention/decode.py": ("decode",),
    "attention/scores.py": ("attention", "decode"),
    "tiles.py": ("attention", "decode", "cross_entropy"),
    "attention/ranges.py": ("attention", "decode"),
    "attention/call.py": ("attention", "decode"),
    "operators.py": ("attention", "decode", "cross_entropy", "symmetric_product"),
} | {f"{name}.py": (name,) for name in ALL}
"""Which questions concern a file; a file of attention that is not named here is "attention"."""


def questions_for(mutant: Mutant) -> list[Question]:
    """The questions that a mutant is asked, those first that are likely to come by its place."""
    groups = CONCERNED.get(mutant.file, ("attention",))
    found = (question for group in groups for question in ALL[group]())
    asked = [question for question in found if question.concerns(mutant)]
    return sorted(asked, key=lambda question: -len(question.words & mutant.about))
