"""Ranges of numbers: what stands exactly at a bound, and its neighbours on both sides."""

import math
import typing

import pytest

from nanolm.config import ranges
from nanolm.config.ranges import Within

NAMED = {
    name: typing.get_args(annotated)
    for name, annotated in vars(ranges).items()
    if typing.get_origin(annotated) is typing.Annotated
}


def neighbours(kind, bound):
    """(the number before, the number after) a bound, of the kind."""
    if kind is int:
        return bound - 1, bound + 1
    return math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf)


@pytest.mark.parametrize("name", NAMED)
def test_a_bound_belongs_to_its_range_or_does_not_and_what_is_beyond_never_does(name):
    kind, within = NAMED[name]
    for word, bound, inside in (
        ("least", within.least, True),
        ("most", within.most, True),
        ("above", within.above, False),
        ("below", within.below, False),
    ):
        if bound is None:
            continue
        before, after = neighbours(kind, bound)
        beyond, within_it = (before, after) if word in ("least", "above") else (after, before)
        assert (within.broken(kind(bound)) is None) == inside, (word, bound)
        assert within.broken(beyond) is not None and within.broken(within_it) is None


@pytest.mark.parametrize(
    ("within", "value", "sentence"),
    [
        (Within(1), 0, "at least 1"),
        (Within(most=5), 6, "at most 5"),
        (Within(above=0), 0, "more than 0"),
        (Within(below=1), 1, "less than 1"),
        (Within(0, 1), 2, "at most 1"),
    ],
)
def test_what_is_told_is_the_bound_that_was_broken(within, value, sentence):
    assert within.broken(value) == sentence and sentence in repr(within)
