"""Mutants of the kernels, made by a program from their sources: which of them the trials find."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.kernel_tools import mutation
from tests.kernel_tools.equivalent import EQUIVALENT
from tests.kernel_tools.mutation import draw, held_out, mutants
from tests.kernel_tools.mutation_operators import OPERATORS

if torch.cuda.is_available():
    pytest.skip("mutants run in the interpreter", allow_module_level=True)

ROOT = pathlib.Path(__file__).parents[1]


def examine(*words):
    """`python -m tests.kernel_tools.mutants`."""
    command = [sys.executable, "-m", "tests.kernel_tools.mutants", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_mutants_are_many_and_of_every_kind():
    found = mutants()
    assert len(found) >= 200 and len({mutant.name for mutant in found}) == len(found)
    for operator in OPERATORS:
        assert sum(mutant.operator == operator for mutant in found) >= 20, operator
    assert all(mutant.source() != (mutation.ROOT / mutant.file).read_text() for mutant in found)
    assert 0.2 < sum(map(held_out, found)) / len(found) < 0.3


def test_a_mutant_is_its_source_with_one_place_changed():
    name = "attention/scores.py visible bounds: at - s < masks.window -> (at - s) <= masks.window"
    (mutant,) = [mutant for mutant in mutants() if mutant.name == name]
    source = (mutation.ROOT / mutant.file).read_text()
    assert mutant.source() == source.replace(
        "(at - s < masks.window)", "((at - s) <= masks.window)"
    )
    assert mutant.interpreted and {"window", "masks", "visible"} <= mutant.about


@pytest.mark.slow
def test_names_stay_when_lines_move(tmp_path, monkeypatch):
    before = [mutant.name for mutant in mutants()]
    shutil.copytree(mutation.ROOT, tmp_path / "kernels")
    for file in mutation.FILES:
        path = tmp_path / "kernels" / file
        moved = re.sub(r"(?m)^(?=@|def )", "# Moved.\n\n", path.read_text())
        path.write_text(f"# One line more.\n{moved}")
    monkeypatch.setattr(mutation, "ROOT", tmp_path / "kernels")
    assert [mutant.name for mutant in mutants.__wrapped__()] == before


def test_what_is_argued_away_is_there_and_has_a_reason():
    names = {mutant.name for mutant in mutants()}
    assert set(EQUIVALENT) <= names
    assert all(len(reason.split()) >= 5 for reason in EQUIVALENT.values())


def test_a_draw_has_every_operator_and_hardly_changes_when_one_mutant_goes():
    some = draw(60, "check", mutants())
    assert {mutant.operator for mutant in some} == set(OPERATORS)
    assert draw(30, "check", mutants()) == some[:30]
    less = [mutant for mutant in mutants() if mutant != some[0]]
    assert len(set(draw(60, "check", less)) & set(some)) >= 58
    assert draw(60, "other", mutants()) != some


@pytest.mark.slow
def test_mutants_of_the_gate_are_found_and_known_ones_are_read(tmp_path):
    words = (
        "--count",
        "3",
        "--only",
        "glu_forward_kernel bounds",
        "--out",
        str(tmp_path / "m.json"),
    )
    done = examine(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100.0% found" in done.stdout and done.stderr.count("sanitizer") >= 1
    again = examine(*words)
    assert again.stdout == done.stdout and again.stderr == ""


@pytest.mark.slow
def test_ninety_five_of_a_hundred_mutants_are_found(tmp_path, capsys):
    """Sixty by a seed; the questions that find them find nothing in the kernels as they are."""
    done = examine(
        "--count", "60", "--seed", "check", "--control", "--out", str(tmp_path / "m.json")
    )
    with capsys.disabled():
        print("\n" + done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
