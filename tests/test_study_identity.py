"""The key of a study's cell: what changes it, and what does not."""

import json

import pytest

from nanolm.finetune.run import load_task_config
from nanolm.finetune.study.cells import groups_of
from nanolm.finetune.study.identity import identity
from tests.finetuned import checkpoint, questions, table


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    """key(*words, defaults=None): the key of a config that these words change."""
    folder = tmp_path_factory.mktemp("identity")
    table(folder / "kinds", "train", questions(12, 0))

    def of(*words, defaults=None):
        given = [f"--init_from={checkpoint('mlm')}", f"--data.path={folder / 'kinds'}", *words]
        return identity(load_task_config(given, groups_of), {} if defaults is None else defaults)

    return of


@pytest.mark.parametrize(
    "word",
    [
        "--train.epochs=7",
        "--run.seed=1",
        "--weights=random",
        "--objective.name=embed",
        "--objective.label_smoothing=0.2",
        "--optim.lr=0.5",
        "--augment.dropout=0.3",
        "--data.limit=5",
    ],
)
def test_whatever_decides_a_figure_changes_the_key(key, word):
    assert key(word) != key()


@pytest.mark.parametrize("word", ["--run.log_every=3", "--run.dir=x", "--train.epochs=3"])
def test_ways_to_run_and_defaults_that_are_said_do_not(key, word):
    assert key(word) == key()


def test_tasks_that_say_nothing_are_told_apart(key):
    """Every leaf of both is at its default; the names are not left out."""
    assert key("--objective.name=embed") != key("--objective.name=choose_dual")


def test_the_defaults_of_the_first_day_hold(key):
    defaults = {}
    before = key(defaults=defaults), key("--train.epochs=7", defaults=defaults)
    kept = json.loads(json.dumps(defaults))
    assert kept["TaskTrainConfig.epochs"] == 3
    # A key that is new since then changes no cell, as long as nobody says it.
    grown = {name: value for name, value in kept.items() if name != "AugmentConfig.dropout"}
    assert key(defaults=grown) == before[0] and grown == kept
    assert key("--augment.dropout=0.3", defaults=kept) != before[0]
    # A default that was another on that day counts as said, in the cells that lean on it.
    other = kept | {"TaskTrainConfig.epochs": 5}
    assert key(defaults=other) != before[0]
    assert key("--train.epochs=7", defaults=other) == before[1]
