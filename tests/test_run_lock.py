"""One folder, one writer: a second start in a folder in which a run trains is refused."""

import fcntl
import os
import signal

import pytest

from nanolm import run as run_module
from nanolm.checkpoint.run_lock import LOCK, NO_LOCKS, RunLock, require_free
from nanolm.errors import UserError
from tests.finetuned import checkpoint, finetune
from tests.kinds_of_run import data_of, words_of
from tests.prepared import train

SHORT = ("--train.steps=1", "--schedule.warmup=0", "--eval.batches=1")


def told_elsewhere(run):
    """What another process is told that wants the folder, "" when it gets it."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            told = pipe.read()
        os.waitpid(child, 0)
        return told
    try:
        RunLock(run)
    except UserError as error:
        os.write(writing, str(error).encode())
    os._exit(0)


@pytest.fixture
def holder(tmp_path):
    """(folder, id) of a process that holds the folder until it is killed."""
    run = tmp_path / "run"
    run.mkdir()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with RunLock(run):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    yield run, child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_lock_is_freed_at_its_end_and_never_a_childs(tmp_path):
    with RunLock(tmp_path) as lock:
        assert lock.missing is None
        assert f"is being written by process {os.getpid()} on " in told_elsewhere(tmp_path)
    assert told_elsewhere(tmp_path) == ""
    require_free(tmp_path)


def test_a_killed_process_frees_it(holder):
    run, child = holder
    with pytest.raises(UserError, match=f"process {child} on "):
        require_free(run)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    require_free(run)


def test_a_folder_that_is_free_is_not_touched(tmp_path):
    require_free(tmp_path)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_file_system_without_locks_is_told_of(number, tmp_path, monkeypatch, capsys):
    def refused(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refused)
    train(tmp_path / "run", *SHORT)
    assert f"without locks ({os.strerror(number)}): nothing refuses" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        monkeypatch.setattr(fcntl, "lockf", lambda file, how: os.stat(tmp_path / "none"))
        RunLock(tmp_path)


STARTS = {
    "pretrain": lambda run, *words: train(run, *SHORT, *words),
    "finetune": lambda run, *words: finetune(
        checkpoint("mlm"), data_of("classify"), run, *words_of("classify"), *words
    ),
}


@pytest.mark.parametrize("resume", ["never", "auto"])
@pytest.mark.parametrize("kind", STARTS)
def test_a_second_start_is_refused_and_works_when_the_first_has_ended(kind, resume, holder):
    run, child = holder
    with pytest.raises(UserError, match=f"written by process {child} on .*; wait until it has"):
        STARTS[kind](run, f"--resume={resume}")
    assert [path.name for path in run.iterdir()] == [LOCK]
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    STARTS[kind](run, f"--resume={resume}")
    assert (run / "summary.json").is_file()


def test_who_writes_is_told_before_what_it_has_written(holder):
    """ "--resume auto continues it" would lead to the other refusal."""
    run, child = holder
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n')
    for resume in ("never", "auto"):
        with pytest.raises(UserError, match=f"written by process {child} on "):
            train(run, *SHORT, f"--resume={resume}")


def test_a_run_holds_its_folder_while_it_trains(tmp_path, monkeypatch):
    run, told = tmp_path / "run", []

    def assemble(*given, **named):
        told.append(told_elsewhere(run))
        trainer = ASSEMBLE(*given, **named)
        fit, trainer.fit = trainer.fit, lambda: (told.append(told_elsewhere(run)), fit())[1]
        return trainer

    monkeypatch.setattr(run_module, "assemble", assemble)
    train(run, *SHORT)
    assert all(f"process {os.getpid()} on" in line for line in told) and len(told) == 2
    assert told_elsewhere(run) == ""


ASSEMBLE = run_module.assemble
