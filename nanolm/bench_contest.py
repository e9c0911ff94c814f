"""A contest: contestants that live in processes of their own and take their turns one by one.

    A B C A B C A B C …            ratio of A to B = median over turns of  time(B) / time(A)

All stand ready at once, built, compiled and warm, and only one works at a time. So whatever else
the machine does for a minute meets them all, a turn's quotient compares neighbours in time, and
many short turns cost no more than a few long ones. (A process per measurement, with a start of its
own, puts half a minute between two that are to be compared.)

Both ends of the pipe are here: `Player` is the contest's end, `serve` that of a contestant.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from nanolm.bench_cells import ENVIRONMENT, last_line, python_path, thread_variables
from nanolm.errors import UserError

TRIAL_TURNS = 3
"""Turns in which a contestant's variants are compared before the contest."""


def serve(facts: dict[str, Any], turn: Callable[[], dict[str, Any]]) -> None:
    """A contestant's life: says that it is ready, then takes a turn for every line it is sent.

    The answers alone go to stdout: whatever else would be printed there goes to stderr.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), file=answers, flush=True)


class Player:
    """A contestant's process. `job` goes to `python -m module` as its one argument."""

    def __init__(self, job: dict[str, Any], module: str) -> None:
        self.job, self.module = job, module
        self.turns: list[dict[str, Any]] = []
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed when it leaves)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job)],
            env=os.environ | ENVIRONMENT | thread_variables(job) | {"PYTHONPATH": python_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def ready(self) -> None:
        """Waits until it is built and warm; raises UserError with its last words when it fails."""
        self.facts = self._answer()

    def turn(self) -> dict[str, Any]:
        """One turn's figures, also kept in `turns`."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.turns.append(self._answer())
        return self.turns[-1]

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            words = last_line(self._said.read(), self._process.returncode)
            raise UserError(f"{self.module}: {self.job['settings']} failed: {words}")
        return json.loads(line)

    def leave(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        self._said.close()


def start(job: dict[str, Any], module: str) -> Player:
    """A contestant that is ready."""
    player = Player(job, module)
    try:
        player.ready()
    except BaseException:
        player.leave()
        raise
    return player


def play(
    variants: dict[str, Sequence[dict[str, Any]]],
    rounds: int,
    module: str,
    rate: Callable[[dict[str, Any]], float],
) -> dict[str, dict[str, Any]]:
    """{name: {job, facts, turns}} after so many rounds.

    variants: contestant -> its jobs, of which the one with the best median `rate` in its trial
    turns takes part. Raises UserError when a contestant fails.
    """
    players: dict[str, Player] = {}
    try:
        for name, jobs in variants.items():
            players[name] = fittest(jobs, module, rate)
        for number in range(1, rounds + 1):
            for player in players.values():
                player.turn()
            print(f"round {number} of {rounds}", file=sys.stderr)
        return {
            name: {"job": player.job, "facts": player.facts, "turns": player.turns}
            for name, player in players.items()
        }
    finally:
        for player in players.values():
            player.leave()


def fittest(
    jobs: Sequence[dict[str, Any]], module: str, rate: Callable[[dict[str, Any]], float]
) -> Player:
    """The player of the fastest of one contestant's jobs, which took their trial turns in turn."""
    players: list[Player] = []
    try:
        players += [start(job, module) for job in jobs]
        for _ in range(TRIAL_TURNS if len(jobs) > 1 else 0):
            for player in players:
                player.turn()
    except BaseException:
        for player in players:
            player.leave()
        raise
    best = players[0]
    if len(jobs) > 1:
        best = max(players, key=lambda p: statistics.median(map(rate, p.turns)))
    for player in players:
        player.turns = []
        if player is not best:
            player.leave()
    return best
