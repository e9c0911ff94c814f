"""Two texts in one sequence: which tokens of the second are marked as the first's too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanolm.errors import UserError
from nanolm.finetune.tasks.frames import FRAMES
from nanolm.finetune.tasks.items import Sequence
from tests.test_objectives_tasks import RECORDS, build, tensors

TWO_SEGMENTS = {"n_segments": 2}
CASES = [("read", {}), ("choose", {}), ("regress", {"pair": True})]
CLS, SEP, MASK = 0, 1, 2
SPECIAL = np.arange(10) < 3
ids = st.lists(st.integers(MASK, 9), max_size=12)


@given(ids, ids)
def test_marks_are_the_words_that_the_first_text_has(first, second):
    """Against a rule written token by token; masks and separators are no words."""
    tokens = np.array([CLS, *first, SEP, *second, SEP])
    plain = Sequence(tokens, len(first) + 2)
    marked = Sequence(tokens, len(first) + 2, mark_shared=True)
    assert plain.segments(SPECIAL).tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    shared = [0 if token in first and token != MASK else 1 for token in second]
    assert marked.segments(SPECIAL).tolist() == [0] * (len(first) + 2) + [*shared, 1]
    assert marked.segments(SPECIAL).dtype == np.int64


def test_a_text_without_a_second_has_nothing_to_mark():
    tokens = np.array([CLS, 5, 5, SEP])
    assert Sequence(tokens, len(tokens), mark_shared=True).segments(SPECIAL).tolist() == [0] * 4


@pytest.mark.parametrize("trunk", ["encoder", "decoder"])
@pytest.mark.parametrize(("task", "options"), CASES)
def test_marks_change_the_segments_and_nothing_else_of_a_batch(task, trunk, options):
    plain, split = build(task, trunk, model=TWO_SEGMENTS, **options)
    marked, marked_split = build(task, trunk, model=TWO_SEGMENTS, mark_shared=True, **options)
    _, before = tensors(plain.objective, split.items)
    _, after = tensors(marked.objective, marked_split.items)
    assert before.keys() == after.keys()
    for name in before.keys() - {"segments"}:
        np.testing.assert_array_equal(before[name], after[name])
    assert (after["segments"] <= before["segments"]).all()
    n_marked = (after["segments"] < before["segments"]).sum()
    assert 0 < n_marked < before["segments"].sum()


@pytest.mark.parametrize("trunk", ["encoder", "decoder"])
@pytest.mark.parametrize(("task", "options"), CASES)
def test_packed_equals_padded_with_marks(task, trunk, options):
    totals = []
    for pack in (True, False):
        learner, split = build(
            task, trunk, pack=pack, model=TWO_SEGMENTS, mark_shared=True, **options
        )
        terms = learner(tensors(learner.objective, split.items)[0])
        totals.append(sum(terms[name].sum.item() for name in learner.objective.weights))
    assert totals[0] == pytest.approx(totals[1], abs=1e-4)


def test_what_cannot_be_marked_is_refused():
    with pytest.raises(UserError, match="this base has none"):
        build("read", "encoder", mark_shared=True)
    with pytest.raises(UserError, match="these records have one"):
        build("classify", "encoder", model=TWO_SEGMENTS, mark_shared=True)
    with pytest.raises(UserError, match="mark_shared cannot be true"):
        build("prompt", "encoder", model=TWO_SEGMENTS, mark_shared=True)
    assert "text_pair" not in RECORDS["classify"][0]


class Specials:
    """A tokenizer of three special tokens."""

    sep = 2
    separators = 1

    def role(self, name):
        return {"cls": 1, "sep": 2, "eos": 3}[name]


@pytest.mark.parametrize("trunk", FRAMES)
def test_a_frame_says_where_the_second_text_begins_and_cuts_the_longer_one(trunk):
    frame, role = FRAMES[trunk], Specials().role
    begin, end = list(map(role, frame.begin)), list(map(role, frame.end))
    first, second = np.arange(10, 14), np.arange(20, 29)
    for room, kept, cut in ((13, 9, 0), (12, 8, 1), (8, 4, 5)):
        length = room + len(begin) + len(end) + 1
        sequence, lost = frame.around(Specials(), length, first, second)
        before = [*begin, *first, Specials.sep]
        assert list(sequence.tokens) == [*before, *second[:kept], *end]
        assert (sequence.second, lost) == (len(before), cut)
    alone, lost = frame.around(Specials(), 3 + len(begin) + len(end), first)
    assert list(alone.tokens) == [*begin, *first[:3], *end]
    assert (alone.second, lost) == (len(alone.tokens), 1)
