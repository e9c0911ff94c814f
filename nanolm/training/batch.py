"""MicroBatch: what one forward pass reads, on its way from the loader to the model.

A rank that has no rows of a step still takes part in the collectives of its passes. It reads a
*blank* then: the tensors of a real micro-batch, no row ids and no targets, so that it counts for
nothing (`Backward` multiplies its loss by zero, and evaluation leaves it out).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(slots=True)
class MicroBatch:
    """`tensors` by name (integers as int64), and on the host `counts`, the targets of each loss
    term, and `row_ids` int64 [B], to name the rows of a bad step."""

    tensors: Mapping[str, Tensor]
    counts: Mapping[str, int]
    row_ids: np.ndarray

    def to(self, device: torch.device | str, pin: bool) -> MicroBatch:
        """The same batch on an accelerator; `pin` copies by page-locked memory, not waiting."""
        tensors = {
            name: (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)
            for name, tensor in self.tensors.items()
        }
        return MicroBatch(tensors, self.counts, self.row_ids)

    def blank(self) -> MicroBatch:
        """A batch of the same tensors that counts for nothing."""
        return MicroBatch(self.tensors, {}, self.row_ids[:0])
