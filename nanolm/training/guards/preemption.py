"""Signals: a job that is told to go finishes its step, saves and leaves.

SIGTERM, SIGINT and SIGUSR1 (the notice that schedulers send ahead of time) only set a flag; the
trainer reads it once a step, together with all ranks', so that everyone stops after the same step.
Signals that follow are counted and change nothing.
"""

from __future__ import annotations

import signal
import types

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preemption:
    """Context manager that turns signals into the flag `requested`."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
