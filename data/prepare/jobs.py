"""Jobs: run a function over many items in several processes, a bounded number at a time.

Processes are spawned, not forked: the parent may hold threads (a progress bar, pyarrow's pools),
and a fork copies their locks in whatever state they are. One worker means no processes at all.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self, cast

import pyarrow as pa

from nanolm.errors import UserError

QUEUED_PER_WORKER = 2


class Jobs:
    """A pool that lives through all phases of one preparation; use it as a context manager."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(
        self, function: Callable, calls: Sequence[tuple], done: Callable[[int], None]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number of the call, result) as calls finish, in any order.

        `done(number)` is told of each. Raises what a call raised first, and UserError when a
        worker process dies.
        """
        if self.workers == 1 or (len(calls) < 2 and self._pool is None):
            for number, arguments in enumerate(calls):
                result = function(*arguments)
                done(number)
                yield number, result
            return
        try:
            yield from self._run_in_pool(function, calls, done)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process of `prepare` was killed (out of memory?); lower --workers and "
                "run the same command again, finished parts are kept"
            ) from error

    def _run_in_pool(
        self, function: Callable, calls: Sequence[tuple], done: Callable[[int], None]
    ) -> Iterator[tuple[int, Any]]:
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
            )
        running: dict[concurrent.futures.Future, int] = {}
        queue = iter(enumerate(calls))
        exhausted = False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < QUEUED_PER_WORKER * self.workers:
                    if (call := next(queue, None)) is None:
                        exhausted = True
                    else:
                        running[self._pool.submit(function, *call[1])] = call[0]
                finished, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    number = running.pop(future)
                    result = future.result()
                    done(number)
                    yield number, result
        finally:
            for future in running:
                future.cancel()


def _start_worker() -> None:
    """One thread a worker, and its end when its parent is killed: it would wait for ever."""
    pa.set_cpu_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    parent = cast(multiprocessing.process.BaseProcess, multiprocessing.parent_process())

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
