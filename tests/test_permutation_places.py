"""Which places XLNet predicts, against every way to choose them; and its memory, against one row
that holds both."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from nanolm.model.trunk import Inputs
from nanolm.objectives.permutation import PermutationOptions
from nanolm.ops.masks import Mask
from tests.test_xlnet import BEFORE, SEGMENTS, SHAPE, TOKENS, B, M, T, some_order, two_streams


def chances(n, one_in, longest):
    """{places: how likely they are}, by following every draw of the paper's sections 2.3 and 3.1:
    the first context begins anywhere that leaves room for all, a stretch has 1 to `longest` tokens
    or what is left, and stands anywhere in a context of `one_in` times its length."""
    found = Counter()

    def follow(begin, left, places, chance):
        if not left:
            found[places] += chance
            return
        for drawn in range(1, longest + 1):
            length = min(drawn, left)
            free = length * (one_in - 1) + 1
            for offset in range(free):
                stretch = range(begin + offset, begin + offset + length)
                each = chance / (longest * free)
                follow(begin + length * one_in, left - length, (*places, *stretch), each)

    n_predicted = n // one_in
    begins = n - n_predicted * one_in + 1
    for begin in range(begins):
        follow(begin, n_predicted, (), Fraction(1, begins))
    return found


@pytest.mark.parametrize(("n", "one_in", "longest"), [(6, 6, 1), (8, 3, 2), (10, 4, 5), (11, 3, 2)])
def test_places_are_as_likely_as_the_paper_says(n, one_in, longest):
    options, draws = PermutationOptions(one_in=one_in, longest_span=longest), 8000
    rng = np.random.default_rng(n)
    seen = Counter(tuple(options.places(n, rng).tolist()) for _ in range(draws))
    expected = chances(n, one_in, longest)
    assert sum(expected.values()) == 1 and set(seen) <= set(expected)
    often = [ways for ways, chance in expected.items() if chance * draws >= 5]
    counts = [[seen[ways], float(draws * expected[ways])] for ways in often]
    rest = draws - np.sum(counts, axis=0)
    if rest[1] >= 5:  # all that is too rare to be compared alone
        counts.append(rest.tolist())
    observed, wanted = np.array(counts).T
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("segments", [None, SEGMENTS.expand(B, T)], ids=["one text", "segments"])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("position", ["pre", "post"])
@torch.no_grad()
def test_a_memory_is_what_one_longer_row_would_read(make_learner, position, streams, segments):
    """The memory sees itself alone, the row sees both: so says an order, of a row that holds both.
    `transformers` has post-norm only."""
    keys = {"norm_position": position, "init_std": 0.3}
    trunk = make_learner(SHAPE | keys, {"name": "permutation"}, row_length=T).trunk
    places, order = some_order()
    if streams == 2:
        short = two_streams(places, order, M, memory_tokens_BM=BEFORE, segments_BT=segments)
    else:
        order = torch.zeros_like(order)
        short = Inputs(tokens_BT=TOKENS, memory_tokens_BM=BEFORE, segments_BT=segments)
    first = torch.zeros(B, M, dtype=torch.long)
    later = torch.cat([first, order + 1], dim=1)  # so late that the memory sees nothing of it
    places = places + M if streams == 2 else None
    queries = later if places is None else torch.cat([later, later.gather(1, places) - 1], dim=1)
    long = Inputs(
        tokens_BT=torch.cat([BEFORE, TOKENS], dim=1),
        segments_BT=None if segments is None else torch.cat([first, segments], dim=1),
        mask=Mask(order=queries, key_order=later),
        places_BP=places,
    )
    torch.testing.assert_close(trunk(short), trunk(long)[:, M:], atol=1e-5, rtol=1e-5)
