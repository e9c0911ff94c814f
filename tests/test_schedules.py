"""Learning-rate schedules are pure functions with the shapes that their formulas promise."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanolm.errors import UserError
from nanolm.registry import SCHEDULES
from nanolm.training.schedules import build_schedule

NAMES = ["cosine", "linear", "wsd", "inverse_sqrt", "constant"]


@given(st.sampled_from(NAMES), st.integers(1, 300), st.data())
def test_rises_to_the_peak_then_never_rises_again(name, steps, data):
    warmup = data.draw(st.integers(0, steps))
    factor = build_schedule(SCHEDULES.get(name).options(warmup=warmup), steps)
    values = [factor(step) for step in range(steps)]
    assert values == [factor(step) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    assert values[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    after = values[warmup:]
    assert all(a >= b for a, b in itertools.pairwise(after))


def test_known_values():
    build = lambda name, **keys: build_schedule(SCHEDULES.get(name).options(**keys), 100)  # noqa: E731
    cosine = build("cosine", warmup=20, floor=0.1)
    assert cosine(20) == 1 and cosine(60) == pytest.approx(0.55)
    assert cosine(99) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 79 / 80)) / 2)
    assert build("linear", warmup=20)(60) == pytest.approx(0.5)
    wsd = build("wsd", decay=0.2)
    assert [wsd(0), wsd(80), wsd(90)] == pytest.approx([1, 1, 0.5])
    assert build("inverse_sqrt", warmup=25)(99) == pytest.approx(0.5)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"schedule.warmup=11 .* train.steps=10"):
        build_schedule(SCHEDULES.get("cosine").options(warmup=11), 10)
