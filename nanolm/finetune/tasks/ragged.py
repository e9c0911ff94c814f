"""Scores of unequal numbers of things as one rectangle, so that a softmax runs over each group.

Used by tasks that choose among the tokens of a sequence (read) or the candidates of a question
(choose). Shapes: N groups, L the largest group, M things in all groups.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, …, for each of the lengths, end to end: int64[sum]."""
    return np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])


def columns(lengths: np.ndarray) -> np.ndarray:
    """0 … L-1, int64[L]: a batch carries it for its length, since the device knows L too late."""
    return np.arange(lengths.max(), dtype=np.int64)


def ragged(values_M: Tensor, owner_M: Tensor, place_M: Tensor, shape: tuple[int, int]) -> Tensor:
    """[N, L], which is `shape`, with value m at (owner, place) and -inf where a group has no more
    things."""
    n_groups, width = shape
    flat = values_M.new_full((n_groups * width,), -torch.inf)
    return flat.index_put((owner_M * width + place_M,), values_M).view(n_groups, width)
