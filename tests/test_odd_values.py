"""Whatever stands in a cell, a task takes it or says in one sentence why not."""

import dataclasses
import itertools
import math

import pytest

from nanolm.data.tables.files import Table
from nanolm.errors import UserError
from nanolm.finetune.config import TaskDataConfig
from nanolm.finetune.splits import make_split
from nanolm.registry import OBJECTIVES
from tests.test_objectives_tasks import RECORDS, build

ODD = [None, True, -1, 0.5, 10**400, math.inf, -math.inf, math.nan, "", " ", "x", "1e999", "0.5"]
ODD += [[], {}, [None], [[]], {"text": "a"}]
TURNS = [{"role": "user", "content": "say set"}, {"role": "assistant", "content": "set"}]


def spoiled(value):
    """The value with something odd in its place, or in that of a part of it."""
    yield from ODD
    if isinstance(value, list) and value:
        yield from ([inner, *value[1:]] for inner in spoiled(value[0]))
    if isinstance(value, dict):
        yield from (value | {key: inner} for key in value for inner in spoiled(value[key]))


def cases(record):
    """Copies of a record, each with one odd value."""
    return [record | {field: odd} for field in record for odd in spoiled(record[field])]


@pytest.mark.parametrize("task", [*RECORDS, "dialogue"])
def test_a_task_takes_a_value_or_says_why_not(task):
    name = "write" if task == "dialogue" else task
    objective = build(name, "decoder" if name in ("write", "choose_lm") else "encoder")[0].objective
    records = [{"messages": TURNS}] if task == "dialogue" else RECORDS[name][1:3]
    if task == "dialogue":
        objective.options = dataclasses.replace(objective.options, chat=True)
        objective.fields, objective.gold = ("messages",), ()
    refused = 0
    for record in itertools.chain.from_iterable(map(cases, records)):
        problem = objective.check(record, with_gold=True)
        refused += problem is not None
        if problem is None:
            rows = Table("t", [record], [1])
            assert make_split("train", rows, objective, TaskDataConfig()).items
        assert problem is None or (problem and "\n" not in problem)
        asked = objective.check(record, with_gold=False)
        assert asked is None or asked
        whole = Table("t", [record, *records], list(range(1, len(records) + 2)))
        try:  # what the labels, or the scale, are taken from
            OBJECTIVES.get(name).build.resolve(objective.options, whole)
        except UserError as error:
            assert "\n" not in str(error)
    assert refused > len(ODD) // 2


def test_a_label_that_is_no_whole_number_names_no_candidate():
    objective = build("choose", "encoder")[0].objective
    record = {"question": "q", "choices": ["1", "0"], "label": 0}
    labels = {0: 0, 1.0: 1, "1": 0, "0": 1, 0.5: None, 1.7: None, math.inf: None, 2: None}
    assert {label: objective.right(record | {"label": label}) for label in labels} == labels
