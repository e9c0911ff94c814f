"""Mixture of corpora and shares of ranks: index arithmetic, checked as such."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.data.mixture import FINEST, Mixture
from nanolm.data.schedule import cut, shard_rows, share_of
from nanolm.errors import UserError

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
INTEGERS = st.lists(st.integers(1, 500), min_size=1, max_size=9)
REALS = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9)


@PROPERTY
@given(weights=st.one_of(INTEGERS, REALS), start=st.integers(0, 10**12), data=st.data())
def test_every_window_is_within_two_rows_of_the_shares(weights, start, data):
    mixture = Mixture(weights)
    corpora, ranks = mixture.locate(np.arange(start, start + 3000))
    for corpus, share in enumerate(mixture.shares):
        mine = corpora == corpus
        # Error of the running count against the share, over all windows at once: the largest
        # difference between two of these is the worst window.
        error = np.concatenate([[0], np.cumsum(mine)]) - float(share) * np.arange(3001)
        assert error.max() - error.min() < 2
        assert np.array_equal(np.diff(ranks[mine]), np.ones(max(0, mine.sum() - 1)))
    first, last = sorted(data.draw(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12))))
    for corpus, share in enumerate(mixture.shares):
        count = _count(mixture, corpus, last) - _count(mixture, corpus, first)
        assert abs(count - share * (last - first)) < 2


def _count(mixture, corpus, row):
    """Rows of `corpus` before global row `row`: the rank of its next row."""
    corpora, ranks = mixture.locate(np.arange(row, row + mixture.period))
    return int(ranks[np.argmax(corpora == corpus)])


@PROPERTY
@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_rank_counts_the_earlier_rows_of_the_same_corpus(weights):
    corpora, ranks = Mixture(weights).locate(np.arange(500))
    seen = [0] * len(weights)
    for corpus, rank in zip(corpora.tolist(), ranks.tolist(), strict=True):
        assert rank == seen[corpus]
        seen[corpus] += 1


def test_shares_are_exact_where_they_can_be_and_close_elsewhere():
    assert Mixture([0.7, 0.2, 0.1]).shares == [Fraction(7, 10), Fraction(1, 5), Fraction(1, 10)]
    assert Mixture([3, 1]).period == 4 and Mixture([2.5]).period == 1
    odd = Mixture([0.123456789, 0.7, 0.31415926])
    total = 0.123456789 + 0.7 + 0.31415926
    assert abs(float(odd.shares[0]) - 0.123456789 / total) <= 1 / FINEST
    assert sum(odd.shares) == 1


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0], [float("nan")], [float("inf"), 1.0]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(UserError, match="weight"):
        Mixture(weights)
    with pytest.raises(UserError, match="never be read"):
        Mixture([1e-7, 1.0])


@PROPERTY
@given(
    step=st.integers(0, 10**9),
    batch=st.integers(1, 300),
    world=st.integers(1, 64),
    micro=st.integers(1, 40),
)
def test_ranks_are_disjoint_complete_and_keep_the_global_order(step, batch, world, micro):
    ranks = [shard_rows(step, batch, rank, world, micro) for rank in range(world)]
    rows = [row for pieces in ranks for piece in pieces for row in piece]
    assert rows == list(range(step * batch, (step + 1) * batch))
    sizes = [sum(map(len, pieces)) for pieces in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert all(0 < len(piece) <= micro for pieces in ranks for piece in pieces)


def test_a_thousand_ranks_and_a_trillion_tokens_touch_only_arithmetic():
    world, batch, block = 1024, 5000, 4096
    blocks = 10**12 // block
    steps = blocks // batch
    for step in (0, 1, steps // 2, steps - 1):
        ends = [share_of(step * batch, (step + 1) * batch, rank, world) for rank in range(world)]
        assert ends[0].start == step * batch and ends[-1].stop == (step + 1) * batch
        assert all(a.stop == b.start for a, b in itertools.pairwise(ends))
        assert {len(share) for share in ends} == {4, 5}


def test_schedule_refuses_nonsense():
    with pytest.raises(ValueError, match="rank 2"):
        share_of(0, 10, 2, 2)
    with pytest.raises(ValueError, match="micro-batch"):
        cut(range(3), 0)
