"""Exponential moving average of the weights, for evaluation and use.

    average <- decay * average + (1 - decay) * weight         after every optimizer step

The average is kept in float32 beside the weights; `swapped()` puts it in their place for a while.
Averaging comes from Polyak & Juditsky 1992, whose mean gives all steps the same weight; this one
forgets, since early weights lie far from the last ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from nanolm.checkpoint.named_tensors import Tensors


class ExponentialMovingAverage:
    """Averages of all trainable parameters of a module, by name in `tensors`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
        self.tensors: Tensors = {name: p.clone() for name, p in self._live.items()}

    def update(self) -> None:
        """One step of the average."""
        # One fused pass over all tensors; in float32, because 1 - decay is often below what
        # bfloat16 can add to a weight.
        torch._foreach_lerp_(list(self.tensors.values()), list(self._live.values()), 1 - self.decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the module computes with the averages; after, with its own weights again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, live in self._live.items():
            saved = live.clone()
            live.copy_(self.tensors[name])
            self.tensors[name].copy_(saved)
