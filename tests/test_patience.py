"""Early stopping: when it ends a run, what remains, and that a resume counts the same."""

import json
import math
import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.config.schema import EvalConfig
from nanolm.errors import UserError
from nanolm.training.guards.patience import Patience
from tests.test_resume import assert_same_bits, metrics
from tests.tiny_run import build_trainer, in_ranks, in_turn, tiny_config


def fit(world, config, kill_after=None):
    """A run whose validation figure is best at step 10; its last step and notes."""

    def hook(record):
        if record["step"] == kill_after and record["kind"] == "train":
            os.kill(os.getpid(), signal.SIGKILL)

    notes: list[str] = []
    trainer = build_trainer(config, world, hook=hook, notes=notes)
    trainer.selection_score = lambda figures: float(abs(trainer.state.done - 10))
    trainer.fit()
    return trainer.state.done, notes


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_it_stops_keeps_the_best_and_resumes_exactly(tmp_path, ranks):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"eval__every": 5, "eval__patience": 2, "run__checkpoint_every": 15}
    changes |= {"run__keep_last": 1, "model__dropout": 0.1}
    for done, notes in in_ranks(ranks, fit, tiny_config(whole, **changes)):
        assert done == 20
        assert notes[-1] == "stopped after step 20 of 40: 2 evaluations in a row without a new best"
    kept = {path.name for path in (whole / "checkpoints").glob("step-*")}
    assert kept == {"step-00000010", "step-00000020"}
    assert (whole / "checkpoints" / "best").read_text() == "step-00000010\n"
    in_ranks(ranks, fit, tiny_config(broken, **changes), 18, kill=True)
    before = metrics(whole)
    broken_again, whole_again = (
        (fit, tiny_config(run, resume="auto", **changes)) for run in (broken, whole)
    )
    (((resumed, _), (stopped, _)), *_) = in_ranks(ranks, in_turn, broken_again, whole_again)
    assert resumed == 20
    assert_same_bits(whole, broken, "checkpoints/step-00000020")
    # a run that has stopped stays where it is
    assert stopped == 20 and metrics(whole) == before


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 4), st.integers(0, 11))
def test_it_is_over_when_the_last_values_bring_nothing_new(values, limit, cut):
    patience = Patience(limit)
    for n, value in enumerate(values, start=1):
        patience.see(float(value))
        since = n - 1 - values.index(min(values[:n]))
        assert patience.over == (since >= limit) and patience.stale == since
        if n == cut:
            saved = json.loads(json.dumps(patience.state()))
            patience = Patience(limit)
            patience.restore(saved)
    assert not Patience(None).over


def test_a_figure_that_is_no_number_is_never_the_lowest():
    patience = Patience(3)
    for value, stale in ((math.nan, 1), (2.0, 0), (math.nan, 1), (1.0, 0)):
        patience.see(value)
        assert patience.stale == stale
    assert patience.lowest == 1.0


def test_mistakes():
    with pytest.raises(UserError, match=r"eval\.patience=1 counts evaluations"):
        EvalConfig(every=0, patience=1)
    with pytest.raises(UserError, match="no usable 'patience'"):
        Patience(1).restore({"stale": -1, "lowest": 0.0})
    Patience(1).restore(None)
