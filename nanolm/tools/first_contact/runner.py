"""Processes with a time limit: started side by side, watched, and ended with all that they started.

A process group alone is not enough to end a measurement: torchrun starts its workers in sessions of
their own. So every process gets a word of its stage in its environment, which whatever it starts
inherits, and at the end all processes that carry the word are killed (Linux, proc(5)).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence

MARK = "NANOLM_FIRST_CONTACT"
"""The variable that holds a stage's word."""
PATIENCE = 30.0
"""Seconds that a killed process may take to be gone: a driver has to let go of it."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (minus a signal's number; None when not even SIGKILL
    ended it), whether it was stopped at the limit, and the file with its output."""

    status: int | None
    stopped: bool
    log: pathlib.Path


def run_together(
    commands: Mapping[str, Sequence[str]],
    logs: pathlib.Path,
    limit: float,
    environment: Mapping[str, str],
    folder: pathlib.Path,
) -> list[Ended]:
    """Runs commands {name: words} side by side in a folder, each with its output in `name`.txt, for
    at most `limit` seconds; what is left of them then, or of what they started, is killed."""
    end, ended = time.monotonic() + limit, []
    with marked(environment) as (word, whole):
        jobs = {}
        for name, command in commands.items():
            jobs[name] = begin(command, logs / f"{name}.txt", whole, folder)
        for job in jobs.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(max(end - time.monotonic(), 0))
        stopped = {name: job.poll() is None for name, job in jobs.items()}
        kill_marked(word)
        for name, job in jobs.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(PATIENCE)
            ended.append(Ended(job.returncode, stopped[name], logs / f"{name}.txt"))
    return ended


@contextlib.contextmanager
def marked(environment: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """A new word, and the environment with it; nothing that carries it outlives the context."""
    word = secrets.token_hex(8)
    try:
        yield word, {**environment, MARK: word}
    finally:
        kill_marked(word)


def begin(
    command: Sequence[str], log: pathlib.Path, environment: Mapping[str, str], folder: pathlib.Path
) -> subprocess.Popen:
    """Starts a process that writes into a log and reads nothing."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )


def kill_marked(word: str) -> None:
    """Kills every process that carries the word until there is none, since they may be starting
    more; gives up after a while, when one does not go."""
    end = time.monotonic() + PATIENCE
    while (pids := marked_processes(word)) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def marked_processes(word: str) -> list[int]:
    """Processes that run with the word in their environment."""
    wanted, found = f"{MARK}={word}".encode(), []
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # gone since, or another user's
            continue
    return found
