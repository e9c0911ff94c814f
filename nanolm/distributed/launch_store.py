"""A key-value store that belongs to this start of the job alone.

torchrun's agent keeps one store for all restarts (torch 2.13, c10d rendezvous), and process groups
publish their addresses in it under the same names each time; after a restart a rank may then read
the address of a peer that is dead, and waits for it until the time-out. The restart counter is no
remedy: agents count for themselves, and a replaced node begins at zero. So the ranks agree on a
name for this start that nobody can have used before:

    rank r   writes hello/r = a random number, waits until `start` repeats it, writes token/r
    rank 0   writes start = (random token, all hellos it sees) until every token/r is there

What an earlier start left behind holds other random numbers, and is never taken for this one's.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import time

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

PREFIX = "nanolm/start"


def connect_store(seconds: float) -> dist.TCPStore:
    """A connection of its own to the store that the launch's environment names.

    Raises RuntimeError when it does not answer in time.
    """
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=max(seconds, 1.0)),
    )


def hosted_store(rank: int, size: int, seconds: float) -> dist.Store:
    """The store of a launch without an agent's: rank 0 hosts it, and it ends with rank 0."""
    timeout = datetime.timedelta(seconds=seconds)
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    return store


def exchange(store: dist.Store, rank: int, size: int, word: str) -> list[str]:
    """Every rank's word, in the order of ranks; collective. For what must be known before there is
    a process group."""
    store.set(f"{PREFIX}/word/{rank}", word)
    return [store.get(f"{PREFIX}/word/{other}").decode() for other in range(size)]


def is_kept_by_agent() -> bool:
    """Whether the store outlives this start: torchrun's agent hosts it, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_store(rank: int, size: int, seconds: float) -> dist.Store:
    """The launch's store under a name of this start; collective.

    Raises RuntimeError naming the ranks that did not come within `seconds`.
    """
    store = connect_store(seconds)
    token = _invite(store, size, seconds) if rank == 0 else _join(store, rank, seconds)
    return dist.PrefixStore(f"{PREFIX}/{token}", store)


def _invite(store: dist.Store, size: int, seconds: float) -> str:
    token, deadline = secrets.token_hex(8), time.monotonic() + seconds
    while True:
        hellos = {r: _read(store, f"{PREFIX}/hello/{r}") for r in range(1, size)}
        store.set(f"{PREFIX}/start", json.dumps({"token": token, "hellos": hellos}))
        missing = [r for r in range(1, size) if not store.check([f"{PREFIX}/{token}/{r}"])]
        if not missing:
            return token
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing))
            raise RuntimeError(f"Timed out: rank(s) {ranks} did not come within {seconds:.0f} s")
        time.sleep(0.02)


def _join(store: dist.Store, rank: int, seconds: float) -> str:
    hello, deadline = secrets.token_hex(8), time.monotonic() + seconds
    store.set(f"{PREFIX}/hello/{rank}", hello)
    while True:
        start = json.loads(_read(store, f"{PREFIX}/start") or "{}")
        if start.get("hellos", {}).get(str(rank)) == hello:
            store.set(f"{PREFIX}/{start['token']}/{rank}", "here")
            return start["token"]
        if time.monotonic() > deadline:
            raise RuntimeError(f"Timed out: rank 0 did not come within {seconds:.0f} s")
        time.sleep(0.02)


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def told_elsewhere(sentence: str, patience: float = 2.0) -> bool:
    """Whether rank 0 says the same sentence, so that one copy of an error reaches the user.

    Rank 0 leaves its sentence in the launch's store; the others wait for it a little. Where there
    is no store to ask, everybody speaks.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        return False
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"nanolm/error/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}"
    try:
        store = connect_store(patience)
        if rank == 0:
            store.set(key, sentence)
            return False
        return store.get(key).decode() == sentence
    except RuntimeError:
        return False
