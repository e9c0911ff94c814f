"""Watchdog: a rank that hangs is named, with where it hangs, and the job ends so that it restarts.

Each rank has two threads beside training. The *heart* writes a beat (step, phase, a counter) into
the store of the launch every few seconds and reads its successor's, so n ranks cost n reads a
period. The *judge* touches no network; when this rank made no progress for `hang_timeout` seconds,
or its successor's heart stood still for as long, it lets the heart read everybody's beats and
decides:

    a heart stands still     that process is stopped, dead or cut off: its last beat says where
    all hearts beat          the rank that is not waiting for others is the one that hangs; it
                             prints its own Python stacks (faulthandler)
    the store is silent      this node is cut off, and says so

Whoever decides first calls the others through the store. Every rank writes its stacks to `hangs/`
in the run's folder, waits until those whose hearts beat have done so too, since torchrun ends all
others with the first, and exits with status 75 (EX_TEMPFAIL); with --max-restarts the job starts
anew.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from nanolm.distributed.launch_store import connect_store
from nanolm.distributed.world import World
from nanolm.training.phases import Progress

EXIT_STATUS = 75

Beats = Mapping[int, Mapping[str, Any]]


class Watchdog:
    """Context manager around training; `timeout` in seconds, 0 for none."""

    def __init__(self, world: World, progress: Progress, timeout: float, run: pathlib.Path) -> None:
        self.world, self.progress, self.timeout = world, progress, timeout
        self.folder = run / "hangs"
        self.interval = min(max(timeout / 5, 0.1), 5.0)
        self._over = threading.Event()
        self._everybody = False
        self._called = self._spoken = False
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._contact = time.monotonic()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        if self.timeout:
            self._key = self.world.broadcast(f"nanolm/{secrets.token_hex(4)}")
            works = [self._judge] + ([self._beat] if self.world.size > 1 else [])
            self._threads = [threading.Thread(target=work, daemon=True) for work in works]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the heart's last beat, which only a store that does not answer holds up.

        A daemon thread that comes back from the store's C++ while Python shuts down is unwound
        there, and that ends the process with SIGABRT.
        """
        self._over.set()
        for thread in self._threads:
            thread.join(4 * self.interval)

    def _state(self, number: int, phase: str | None = None) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self.progress.step,
            "phase": phase or self.progress.phase,
            "beat": number,
            "spoken": self._spoken,
        }

    def _beat(self) -> None:
        """The heart: writes this rank's beat and reads the beats that the judge needs."""
        store, number, mine, over = None, 0, f"{self._key}/{self.world.rank}", False
        end = f"{self._key}/end"
        while True:
            # A store that is gone is no failure of training by itself; the judge counts seconds.
            try:
                store = store or connect_store(self.interval * 4)
                number += 1
                beat = self._state(number, "done" if over else None)
                store.set(mine, json.dumps(beat))
                if self._spoken:
                    store.set(end, "")
                self._called = self._called or store.check([end])
                self._read(store)
                self._contact = time.monotonic()
            except RuntimeError:
                store = None
            if over:
                return
            over = self._over.wait(self.interval)

    def _read(self, store: Any) -> None:
        size = self.world.size
        ranks = range(size) if self._everybody else [(self.world.rank + 1) % size]
        for rank in ranks:
            key = f"{self._key}/{rank}"
            if store.check([key]):
                beat = json.loads(store.get(key))
                if self._seen.get(rank, ({"beat": None}, 0))[0]["beat"] != beat["beat"]:
                    self._seen[rank] = (beat, time.monotonic())

    def _judge(self) -> None:
        while not self._over.wait(self.interval):
            if self._suspects():
                self._everybody = True
                if not self._over.wait(4 * self.interval) and self._suspects():
                    self._end()
                self._everybody = False

    def _suspects(self) -> bool:
        if self._called:
            return True
        now = time.monotonic()
        # The successor alone: other beats are only fresh while everybody is read.
        beat, since = self._seen.get((self.world.rank + 1) % self.world.size, (None, now))
        silent = beat is not None and beat["phase"] != "done" and now - since > self.timeout
        return silent or now - self.progress.changed > self.timeout

    def _end(self) -> None:
        """Says which rank hangs, if that falls to this one, and ends this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{self.progress.step:08d}-rank-{self.world.rank:04d}.txt"
        path = self.folder / name
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        now = time.monotonic()
        beats = {rank: beat for rank, (beat, _) in self._seen.items()}
        beats[self.world.rank] = self._state(0)
        still = [
            rank
            for rank, (beat, since) in self._seen.items()
            if now - since > 3 * self.interval and beat["phase"] != "done"
        ]
        for rank in set(range(self.world.size)) - beats.keys():
            still.append(rank)
            beats[rank] = {"host": "unknown", "pid": 0, "step": 0, "phase": "start"}
        cut_off = self.world.size > 1 and now - self._contact > 4 * self.interval
        text = verdict(self.world.rank, beats, still, cut_off, now - self.progress.changed)
        if text:
            if self.world.rank in hanging(beats) and not still and not cut_off:
                text += f"\n{path.read_text(encoding='utf-8')}"
            text += "".join(stack_of(beats[rank]) for rank in still)
            print(f"nanolm: {text}", file=sys.stderr, flush=True)
        if not cut_off:
            self._wait_for_others(still)
        for rank in still if text else ():
            kill_sibling(beats[rank])
        os._exit(EXIT_STATUS)

    def _wait_for_others(self, still: list[int]) -> None:
        """Until all ranks whose hearts beat have written their stacks and said what falls to them.

        The call takes two beats to reach them; they take four to read everybody's, and two more
        until their answer is read here.
        """
        self._spoken = True
        others = set(range(self.world.size)) - {self.world.rank, *still}
        for _ in range(12):
            if all(self._seen[rank][0]["spoken"] for rank in others & self._seen.keys()):
                return
            time.sleep(self.interval)


def hanging(beats: Beats) -> list[int]:
    """Ranks that keep the others waiting: at the earliest step, and not themselves waiting."""
    first = min(beat["step"] for beat in beats.values())
    late = [rank for rank, beat in beats.items() if beat["step"] == first]
    busy = [rank for rank in late if beats[rank]["phase"] not in ("communication", "waiting")]
    return sorted(busy or late)


def verdict(rank: int, beats: Beats, still: list[int], cut_off: bool, seconds: float) -> str | None:
    """What this rank has to say, None when it falls to another."""
    here = beats[rank]
    if cut_off:
        return (
            f"rank {rank} on node {here['host']} is cut off: the launch's store at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} does not answer, and "
            f"step {here['step']} ({here['phase']}) stands for {seconds:.0f} s; the job ends for "
            f"restart"
        )
    if still:
        if rank != min(set(beats) - set(still)):
            return None
        told = "; ".join(
            f"rank {r} (pid {beats[r]['pid']} on node {beats[r]['host']}) is stopped, dead or cut "
            f"off: its last heartbeat was in step {beats[r]['step']}, phase {beats[r]['phase']}"
            for r in sorted(still)
        )
        return f"{told}; the job ends for restart"
    if rank not in hanging(beats):
        return None
    return (
        f"rank {rank} (pid {here['pid']} on node {here['host']}) hangs in step {here['step']}, "
        f"phase {here['phase']}, for {seconds:.0f} s; the job ends for restart; its stacks:"
    )


def kill_sibling(beat: Mapping[str, Any]) -> None:
    """Ends a stopped process of the same launcher, which could not answer a polite signal and would
    hold up the restart; processes of other nodes or parents are the launcher's to end."""
    status = pathlib.Path(f"/proc/{beat['pid']}/status")
    if beat["host"] != socket.gethostname() or not status.is_file():
        return
    if f"\nPPid:\t{os.getppid()}\n" in status.read_text(encoding="utf-8"):
        os.kill(beat["pid"], signal.SIGKILL)


def stack_of(beat: Mapping[str, Any]) -> str:
    """py-spy's stacks of a stopped process of this node, empty where there is no py-spy."""
    if shutil.which("py-spy") is None or beat["host"] != socket.gethostname():
        return ""
    command = ["py-spy", "dump", "--nonblocking", "--pid", str(beat["pid"])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"\npy-spy: {error}"
    return f"\n{done.stdout or done.stderr}"
