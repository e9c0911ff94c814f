"""A contest: contestants that live in processes of their own and take their turns one by one.

    A B C A B C A B C …            ratio of A to B = median over turns of  time(B) / time(A)

All stand ready at once, built, compiled and warm, and only one works at a time. So whatever else
the machine does for a minute meets them all, a turn's quotient compares neighbours in time, and
many short turns cost no more than a few long ones. (A process per measurement, with a start of its
own, puts half a minute between two that are to be compared.)

A virtual machine whose host takes its cores away (Linux counts that as stolen time) measures the
host. A round in which more than `QUIET` of the time was stolen is taken again after a rest as long
as itself, up to three times as many rounds as were asked for; the result says how many were quiet.

Both ends of the pipe are here: `Player` is the contest's end, `serve` that of a contestant.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, cast

from nanolm.errors import UserError
from nanolm.processes import python_path
from nanolm.tools.bench.cells import ENVIRONMENT, last_line, thread_variables

TRIAL_TURNS = 3
"""Turns in which a contestant's variants are compared before the contest."""
QUIET = 0.03
"""Share of the cores' time that may be stolen in a round that counts."""


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
        self._input = cast(IO[str], self._process.stdin)
        self._output = cast(IO[str], self._process.stdout)

    def ready(self) -> None:
        """Waits until it is built and warm; raises UserError with its last words when it fails."""
        self.facts = self._answer()

    def turn(self) -> dict[str, Any]:
        """One turn's figures, also kept in `turns`."""
        self._input.write("\n")
        self._input.flush()
        self.turns.append(self._answer())
        return self.turns[-1]

    def _answer(self) -> dict[str, Any]:
        line = self._output.readline()
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
    variants: Mapping[str, Sequence[dict[str, Any]]],
    rounds: int,
    module: str,
    rate: Callable[[dict[str, Any]], float],
) -> dict[str, Any]:
    """A contest of so many rounds: `players` {name: {job, facts, turns}}, and of each round the
    share of the machine's time that was `stolen`.

    variants: contestant -> its jobs, of which the one with the best median `rate` in its trial
    turns takes part. Raises UserError when a contestant fails.
    """
    players: dict[str, Player] = {}
    try:
        for name, jobs in variants.items():
            players[name] = fittest(jobs, module, rate)
        stolen = take_rounds(list(players.values()), rounds)
        entries = {
            name: {"job": player.job, "facts": player.facts, "turns": player.turns}
            for name, player in players.items()
        }
        return {"players": entries, "stolen": stolen}
    finally:
        for player in players.values():
            player.leave()


def take_rounds(players: Sequence[Player], rounds: int) -> list[float]:
    """Takes rounds until so many were quiet, or three times as many were taken; the stolen share of
    each round that counts. The quiet ones count, and the quietest others if they are too few."""
    shares: list[float] = []
    seconds = 0.0
    while not enough(shares, rounds):
        if shares and shares[-1] > QUIET:
            time.sleep(seconds)
        theft, begin = Theft(), time.perf_counter()
        for player in players:
            player.turn()
        seconds = time.perf_counter() - begin
        shares.append(theft.share())
        print(f"round {len(shares)}: {shares[-1]:.0%} of the time stolen", file=sys.stderr)
    kept = quietest(shares, rounds)
    for player in players:
        player.turns = [player.turns[number] for number in kept]
    return [shares[number] for number in kept]


def enough(shares: Sequence[float], rounds: int) -> bool:
    """Whether so many rounds were quiet, or three times as many were taken."""
    return sum(share <= QUIET for share in shares) >= rounds or len(shares) >= 3 * rounds


def quietest(shares: Sequence[float], rounds: int) -> list[int]:
    """The numbers of the quietest rounds, so many of them, in the order in which they were."""
    return sorted(sorted(range(len(shares)), key=shares.__getitem__)[:rounds])


class Theft:
    """What the host takes of this machine's cores from now on."""

    def __init__(self) -> None:
        self._stolen, self._begin = stolen_seconds(), time.perf_counter()

    def share(self) -> float:
        """The stolen share of all cores' time so far."""
        seconds = time.perf_counter() - self._begin
        return (stolen_seconds() - self._stolen) / (seconds * (os.cpu_count() or 1))


def stolen_seconds() -> float:
    """Seconds that this machine's host has taken from its cores since the start (proc(5), stat)."""
    stat = pathlib.Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    return int(stat.read_text().split("\n", 1)[0].split()[8]) / os.sysconf("SC_CLK_TCK")


def quiet(stolen: Sequence[float]) -> str:
    """How quiet the rounds were, in words."""
    count = sum(share <= QUIET for share in stolen)
    return f"{count} of {len(stolen)} rounds quiet, {max(stolen):.0%} stolen in the worst"


def fittest(
    jobs: Sequence[dict[str, Any]], module: str, rate: Callable[[dict[str, Any]], float]
) -> Player:
    """The player of the fastest of one contestant's jobs, which took their trial turns in turn."""
    players: list[Player] = []
    try:
        for job in jobs:  # one by one: what has started is ended when the next one fails
            players.append(start(job, module))
        for _ in range(TRIAL_TURNS if len(jobs) > 1 else 0):
            for player in players:
                player.turn()
    except BaseException:
        for player in players:
            player.leave()
        raise
    best = players[0]
    if len(jobs) > 1:
        best = max(players, key=lambda player: statistics.median(map(rate, player.turns)))
    for player in players:
        player.turns = []
        if player is not best:
            player.leave()
    return best
