"""Where wrong numbers stand, in words: a loop that ends too early, a grid that is too small, a head
that is left out show by their place."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 3
"""Places along an axis, from which on it tells something that some of them are right."""


def where(actual: Tensor, expected: Tensor, allowed: float) -> str:
    """Which places along an axis hold everything that is off by more than `allowed`: "along its
    last axis of 129 only from 128 on". Empty where every axis is wrong throughout."""
    if actual.shape != expected.shape or not actual.dim():
        return ""
    off = ((actual.double() - expected.double()).abs() > allowed) | ~actual.isfinite()
    if not off.any():
        return ""
    found = []
    for axis, length in enumerate(off.shape):
        others = tuple(n for n in range(off.dim()) if n != axis)
        wrong = (off.any(dim=others) if others else off).nonzero()[:, 0].tolist()
        if length >= LEAST and len(wrong) <= length // 2:
            found.append(f"along axis {axis} of {length} {places(wrong, length)}")
    return f"; it is wrong {' and '.join(found)}" if found else ""


def places(wrong: list[int], length: int) -> str:
    """The places, in words."""
    first, last = wrong[0], wrong[-1]
    if len(wrong) < last - first + 1:
        shown = ", ".join(map(str, wrong[:4]))
        return f"at {shown}{', …' * (len(wrong) > 4)} only"
    if last == length - 1:
        return f"only from {first} on"
    return f"only at {first}" if first == last else f"only from {first} to {last}"


def narrow_dtype(x: Tensor) -> torch.dtype | None:
    """The 16-bit dtype that holds all numbers of a wider tensor as they are, or None: such numbers
    have been rounded to it on their way."""
    if x.element_size() <= 2 or not x.numel() or not (x != x.round()).any():
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(x.to(dtype).to(x.dtype), x):
            return dtype
    return None
