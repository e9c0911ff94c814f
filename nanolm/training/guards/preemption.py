"""Signals: a job that is told to go finishes its step, saves and leaves.

SIGTERM, SIGINT and SIGUSR1 (the notice that schedulers send ahead of time) are only noted; the
trainer reads it once a step, together with all ranks', so that everyone stops after the same step.
Signals that follow are counted and change nothing.
"""

from __future__ import annotations

import signal
import types
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preemption:
    """Context manager that notes in `signal` the name of the first signal to arrive."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
