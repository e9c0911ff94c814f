"""RunState: where a run stands, besides its weights, optimizers and averages.

This is all that trainer.json keeps of a run's past. Order, masks and dropout follow from the number
of steps, so that number is the position in the data too, and no generator's state is kept.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping
from typing import Any

import torch

from nanolm.training.guards.patience import Patience
from nanolm.training.throughput import Throughput

RECENT = 64
"""Losses that are remembered: a spike is measured against their median."""


class RunState:
    """Counters of one run; the objects that count for themselves are held by reference."""

    def __init__(
        self, patience: Patience, throughput: Throughput, scaler: torch.amp.GradScaler
    ) -> None:
        self.done = 0
        """Optimizer steps taken, those included that moved no weight."""
        self.best: float | None = None
        """The selection score of the best checkpoint; None while there is none."""
        self.skips = 0
        """Bad steps since the last good one."""
        self.losses: collections.deque[float] = collections.deque(maxlen=RECENT)
        """Losses of the newest good steps."""
        self.began = time.perf_counter()
        """When this start of the run began; who launched it may know an earlier moment."""
        self.earlier = 0.0
        """Seconds that earlier starts took up to the checkpoint that this one goes on from."""
        self.patience, self.throughput, self.scaler = patience, throughput, scaler

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run, with evaluations and checkpoints, over all its starts."""
        return self.earlier + time.perf_counter() - self.began

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "step": self.done,
            "best": self.best,
            "patience": self.patience.state(),
            "skips": self.skips,
            "losses": list(self.losses),
            "seconds": self.throughput.seconds,
            "elapsed": self.elapsed,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `to_json` gave; raises UserError for a damaged patience.

        Checkpoints of early versions have no `patience`.
        """
        self.done, self.best, self.skips = saved["step"], saved["best"], saved["skips"]
        self.patience.restore(saved.get("patience"))
        self.losses.clear()
        self.losses.extend(saved["losses"])
        self.throughput.resume(saved["seconds"], saved["step"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
