"""Small files: whole or absent whatever happens, one sentence when they cannot be written, and
finished cells that are taken up again."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from nanolm import files
from nanolm.checkpoint import container
from nanolm.checkpoint.checkpoints import Checkpoints
from nanolm.checkpoint.run_folder import cut_metrics
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.finetune.study.run import Results
from nanolm.tools.bench.cells import ENVIRONMENT, Cells

WRITERS = {
    "text": lambda path: files.write_text(path, "new\n"),
    "json": lambda path: files.write_json(path, {"new": 1}),
    "line": lambda path: files.append_line(path, "new"),
    "cell": lambda path: files.Finished(path, "a test").put("new", {}),
}
OLD = '{"cells": {}}\n'


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_write_leaves_the_old_file_and_a_leftover_that_is_found(tmp_path, writer, place):
    path = tmp_path / "below" / "file.json"
    path.parent.mkdir()
    path.write_text(OLD)
    child = os.fork()
    if not child:
        setattr(os, place, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        WRITERS[writer](path)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_text() == OLD
    assert files.remove_leftovers(tmp_path) == [f".tmp-file.json-{child}"]
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_failed_write_is_told_and_leaves_nothing_of_it(
    tmp_path, monkeypatch, writer, place, number
):
    path = tmp_path / "file.json"
    path.write_text(OLD)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, place, fail)
    with pytest.raises(UserError) as told:
        WRITERS[writer](path)
    assert str(path) in str(told.value) and os.strerror(number) in str(told.value)
    assert "run the same command again" in str(told.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"] and path.read_text() == OLD


def test_ctrl_c_before_the_block_begins_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*words):
        open(*words).close()  # the file is there
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "open", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt), files.AtomicFile(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_what_earlier_versions_left_is_removed_and_nothing_else(tmp_path):
    left = ["shard.arrow.17.partial", ".partial-head-17", ".partial-000003-17", ".tmp-latest-17"]
    kept = ["shard.arrow", "partial", "a.partial", "step-00000001", "index.json"]
    for name in [*left, *kept]:
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmp-step-00000002-17" / "inside").mkdir(parents=True)
    found = files.remove_leftovers(tmp_path)
    assert sorted(found) == sorted([*left, ".tmp-step-00000002-17"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def checkpoint(run):
    Checkpoints(run, World()).save(1, {"model": {"w": torch.ones(2)}}, {"step": 1}, {})


def metrics(run):
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    cut_metrics(run / "metrics.jsonl", 3)


IN_TRAINING = {
    "checkpoint": checkpoint,
    "metrics": metrics,
    "best": lambda run: (
        (run / "checkpoints").mkdir(parents=True) or Checkpoints(run, World()).mark_best(1)
    ),
    "summary": lambda run: (
        run.mkdir() or files.write_json(run / "summary.json", {}, again=files.RESUME)
    ),
}
ELSEWHERE = {
    "folder": lambda run: container.write_folder(run, {"model": {"w": torch.ones(2)}}, {}),
    "prepare": lambda run: run.mkdir() or files.write_json(run / "manifest.json", {}),
    "study": lambda run: Results(run / "study.json").put("key", {}),
}


@pytest.mark.parametrize("what", [*IN_TRAINING, *ELSEWHERE])
def test_the_remedy_works_in_the_command_that_was_run(tmp_path, monkeypatch, what):
    """A training run refuses to begin again in its folder; other commands have no --resume."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full") as told:
        {**IN_TRAINING, **ELSEWHERE}[what](tmp_path / "run")
    assert ("--resume auto" in str(told.value)) == (what in IN_TRAINING)
    assert ("run the same command again" in str(told.value)) == (what in ELSEWHERE)


def test_what_safetensors_says_in_words_is_understood(tmp_path, monkeypatch):
    def full(*_, **__):
        raise container.SafetensorError("I/O error: Permission denied (os error 13)")

    monkeypatch.setattr(container, "save_file", full)
    with pytest.raises(UserError, match="not written: Permission denied; make the folder writable"):
        checkpoint(tmp_path)


@pytest.mark.parametrize("at", range(12))
def test_what_vanishes_while_leftovers_are_removed_is_gone(tmp_path, monkeypatch, at):
    """Another process removes everything at one of this one's looks at the disk."""
    for name in (".tmp-a-1/sub/.tmp-b-2", ".tmp-a-1/c", ".tmp-d-3", "kept"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmp-a-1" / "link").symlink_to(tmp_path, target_is_directory=True)
    calls = iter(range(100))

    def meanwhile(function):
        def look(*words, **options):
            if next(calls) == at:
                shutil.rmtree(tmp_path / ".tmp-a-1", ignore_errors=True)
                pathlib.Path.unlink(tmp_path / ".tmp-d-3", missing_ok=True)
            return function(*words, **options)

        return look

    with monkeypatch.context() as patch:
        for name in ("scandir", "stat", "unlink", "rmdir"):
            patch.setattr(os, name, meanwhile(getattr(os, name)))
        files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


OTHERS = ["", "[]", "3", "{}", '{"cells": 3}', '{"cells": [["a", {}]]}', "[" * 9999, "\udcff"]


@pytest.mark.parametrize("text", OTHERS, ids=range(len(OTHERS)))
@pytest.mark.parametrize(("opens", "owner"), [(Results, "a study"), (Cells, "a benchmark")])
def test_a_file_of_something_else_is_refused(tmp_path, opens, owner, text):
    path = tmp_path / "results.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"results.json is no results file of {owner}; move it"):
        opens(path)


def test_finished_cells_of_earlier_versions_are_taken_up(tmp_path):
    results, cells = tmp_path / "study.json", tmp_path / "bench.json"
    results.write_text(json.dumps({"defaults": {"A.b": 1}, "cells": {"key": {"val": 0.5}}}))
    read = Results(results)
    read.defaults["A.c"] = 2
    read.put("other", {"val": 0.25})
    again = Results(results)
    assert again.defaults == {"A.b": 1, "A.c": 2} and list(again.cells) == ["key", "other"]

    Cells(cells).get({"jobs": 1}, lambda: {"number": 1})
    held = json.loads(cells.read_text())
    assert list(held) == ["environment", "cells"] and held["environment"] == ENVIRONMENT
    assert Cells(cells).get({"jobs": 1}, lambda: {"number": 2})["number"] == 1
    assert Cells(cells, fresh=True).get({"jobs": 1}, lambda: {"number": 3})["number"] == 3


def test_a_key_is_that_of_earlier_versions():
    """Results that were measured before are found again."""
    assert files.key_of({"b": [1, "ä"], "a": None}) == files.key_of({"a": None, "b": [1, "ä"]})
    assert files.key_of({"b": [1, "ä"], "a": None}) == "07449d0efb6edd53"


def test_figures_may_go_into_a_pipe():
    code = "from nanolm.commands.json_file import write_json; write_json('/dev/stdout', {'a': 1})"
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert json.loads(said) == {"a": 1}


def test_a_page_that_quotes_a_name_which_is_no_text_can_be_written(tmp_path):
    files.write_text(tmp_path / "page", "# na\udcefve: \u00fc\n")
    assert (tmp_path / "page").read_text(encoding="utf-8") == "# na\\udcefve: \u00fc\n"


@pytest.mark.parametrize("name", ["", ".", "./", "/"])
def test_a_name_that_is_none_is_a_folder(name):
    with pytest.raises(IsADirectoryError) as error:
        files.write_text(name, "x")
    assert files.refused_by_the_disk(error.value).endswith("; " + files.REMEDIES[errno.EISDIR])
