"""Relative paths of a run hold from other folders too, and a lost base can be named."""

import shutil

import pytest

from nanolm.checkpoint.places import find_again, with_places
from nanolm.errors import UserError
from tests.finetuned import checkpoint, command, finetune, questions, table

SHORT = ("--train.steps=1", "--train.global_batch=6", "--eval.batch=6")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with data, a base, and an adapter on it, all named by relative paths."""
    home = tmp_path / "home"
    for split in ("train", "val", "test"):
        table(home / "data" / "kinds", split, questions(12))
    shutil.copytree(checkpoint("mlm"), home / "base")
    monkeypatch.chdir(home)
    finetune("base", "data/kinds", "runs/adapted", *SHORT, "--peft.name=lora")
    return home


def test_a_run_is_evaluated_from_anywhere(tree, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tree / "runs", tmp_path / "moved")  # away from its data, which stay
    command("evaluate", str(tmp_path / "moved" / "adapted"))
    command("doctor", str(tmp_path / "moved" / "adapted"), "1")
    shutil.move(tmp_path / "moved", tree / "runs")
    shutil.move(tree, tmp_path / "new home")  # with its data
    adapted = str(tmp_path / "new home" / "runs" / "adapted")
    command("evaluate", adapted)
    lost = shutil.move(tmp_path / "new home" / "base", tmp_path / "lost")
    with pytest.raises(UserError, match=r"make one model of both: `nanolm merge .* --base BASE"):
        command("evaluate", adapted)
    command("merge", adapted, "--base", str(lost), "--out", "merged")
    command("evaluate", "merged")


def test_what_is_there_or_nowhere_is_named_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for path in ("here", str(tmp_path / "here"), "nowhere", "s3://bucket/prefix", "stdlib:x"):
        assert find_again(path, tmp_path / "run") == path


def test_only_paths_of_data_and_bases_are_looked_for(tmp_path, monkeypatch):
    (tmp_path / "x" / "run").mkdir(parents=True)
    (tmp_path / "x" / "train").mkdir()
    found = str(tmp_path / "x" / "train")
    saved = {
        "init_from": "train",
        "run": {"dir": "train"},
        "data": {"path": "train", "corpora": [{"path": "train", "weight": 1}], "split": "train"},
        "objective": {"name": "train", "tasks": {"a": {"data": {"val": "train"}}}},
    }
    assert with_places(saved, tmp_path / "x" / "run") == {
        "init_from": found,
        "run": {"dir": "train"},
        "data": {"path": found, "corpora": [{"path": found, "weight": 1}], "split": "train"},
        "objective": {"name": "train", "tasks": {"a": {"data": {"val": found}}}},
    }
