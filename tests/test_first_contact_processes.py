"""The processes of the first contact with a GPU: whatever a stage started is killed, and nothing
else."""

import os
import pathlib
import sys
import time

import pytest

from nanolm.tools.first_contact import runner
from nanolm.tools.first_contact.runner import marked_processes, run_together

PYTHON = sys.executable


def python(text):
    return [PYTHON, "-S", "-c", text]


def alive(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def together(tmp_path, commands, limit=20.0):
    return run_together(commands, tmp_path, limit, dict(os.environ), tmp_path)


CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print(child.pid, flush=True)
time.sleep({seconds})
"""
"""Starts a process in a session of its own, as torchrun does, and leaves it behind."""


def test_at_the_limit_all_that_was_started_is_killed_and_the_others_are_not(tmp_path):
    commands = {
        "quick": python("print('done')"),
        "slow": python(CHILD.format(seconds=600)),
        "wrong": python("raise SystemExit(7)"),
    }
    begin = time.monotonic()
    ended = {end.log.stem: end for end in together(tmp_path, commands, limit=3.0)}
    assert time.monotonic() - begin < 60
    assert {name: end.stopped for name, end in ended.items()} == {
        "quick": False,
        "slow": True,
        "wrong": False,
    }
    assert ended["quick"].status == 0 and ended["slow"].status == -9 and ended["wrong"].status == 7
    assert not alive(int(ended["slow"].log.read_text()))


def test_what_a_stage_leaves_behind_is_killed(tmp_path):
    (ended,) = together(tmp_path, {"leaver": python(CHILD.format(seconds=0))})
    assert (ended.status, ended.stopped) == (0, False)
    assert not alive(int(ended.log.read_text()))


def test_a_signal_to_the_command_ends_its_stage(tmp_path, monkeypatch):
    """The stage's processes go when the command is left by an exception, whatever it is."""

    def interrupted(*arguments):
        job = started(*arguments)
        jobs.append(job)
        if len(jobs) == 2:
            raise SystemExit(143)
        return job

    jobs, started = [], runner.begin
    monkeypatch.setattr(runner, "begin", interrupted)
    sleep = python("import time; time.sleep(600)")
    with pytest.raises(SystemExit):
        together(tmp_path, {"one": sleep, "two": sleep})
    assert [job.wait(20) for job in jobs] == [-9, -9]


def test_processes_are_found_by_their_word_alone():
    assert marked_processes("a word that nobody carries") == []
