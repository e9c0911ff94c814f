"""Background: one piece of work beside training, such as writing a checkpoint, and how it ended.

The thread is no daemon: a process that leaves, for whatever reason, finishes the work first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one function at a time in a thread; what it raises is raised by `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.error: Exception | None = None
        """Why the work has failed, until `wait` raises it."""

    def start(self, work: Callable[[], object]) -> None:
        """Begins the work, when what was begun before is over; raises what that raised."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,))
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  (wait raises it)
            self.error = error

    def wait(self) -> None:
        """Waits for the work and raises what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error
