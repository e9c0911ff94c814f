"""What `nanolm parity` compares, told by what it asks to be measured; the measures have tests of
their own."""

import json

import pytest

from nanolm import cli
from nanolm.commands import parity
from nanolm.errors import UserError
from nanolm.finetune.parity import CASES as HEADS
from nanolm.inference.parity import CASES as FAMILIES

WAYS = {"in", "out"}


@pytest.fixture
def measured(monkeypatch):
    """(kind, case, way) of all that was asked for; cases called `bad` and `nan` differ."""
    found = []

    def measure(kind):
        def difference(case, way):
            found.append((kind, case, way))
            return {"bad": 1.0, "nan": float("nan")}.get(case, 1e-7)

        return difference

    monkeypatch.setattr(parity, "difference", measure("family"))
    monkeypatch.setattr(parity, "head_difference", measure("head"))
    monkeypatch.setattr(parity, "can_prove", lambda: True)
    return found


def test_all_adds_every_head_of_a_task_to_every_family(measured, tmp_path):
    cli.run(["parity", f"--json={tmp_path / 'few.json'}"])
    few = {("family", case, way) for case in FAMILIES for way in WAYS}
    assert set(measured) == few and len(measured) == len(few)
    measured.clear()
    cli.run(["parity", "--all", f"--json={tmp_path / 'all.json'}"])
    every = few | {("head", case, way) for case in HEADS for way in WAYS}
    assert set(measured) == every and len(measured) == len(every)
    table = json.loads((tmp_path / "all.json").read_text())
    assert table.keys() == FAMILIES.keys() | HEADS.keys()
    assert len(table) == len(FAMILIES) + len(HEADS)


@pytest.mark.parametrize("case", ["bad", "nan"])
@pytest.mark.parametrize("cases", ["CASES", "HEAD_CASES"])
def test_a_row_that_differs_is_told_with_its_way(measured, monkeypatch, cases, case):
    monkeypatch.setattr(parity, cases, {case: None})
    with pytest.raises(UserError, match=rf"{case} \(in\) differs by more than 1e-04"):
        cli.run(["parity", "--all"])


def test_all_and_configs_exclude_each_other(measured):
    with pytest.raises(UserError, match=r"small\.yaml would be compared in full size"):
        cli.run(["parity", "small.yaml", "--all"])
    assert measured == []
