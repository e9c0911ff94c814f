"""Where wrong numbers stand, in words: a loop that ends too early, a grid that is too small, a head
that is left out show by their place."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 2
"""Places along an axis, from which on it tells something that some of them are right."""
MOST = 0.9
"""Share of an axis: a stretch that is longer tells nothing."""
FAR = 10
"""Times what is allowed."""


def where(actual: Tensor, expected: Tensor, allowed: float) -> str:
    """Which places along an axis hold everything that is off by more than `allowed`: "; it is wrong
    along axis 1 of 129 only from 128 on". Empty where every axis is wrong throughout, and where all
    is nearly right: then chance says where."""
    if actual.shape != expected.shape or not actual.dim():
        return ""
    difference = (actual.double() - expected.double()).abs()
    off = (difference > allowed) | ~actual.isfinite()
    if not ((difference > FAR * allowed) | ~actual.isfinite()).any():
        return ""
    found = []
    for axis, length in enumerate(off.shape):
        others = tuple(n for n in range(off.dim()) if n != axis)
        wrong = (off.any(dim=others) if others else off).nonzero()[:, 0].tolist()
        words = places(wrong, length) if length >= LEAST else ""
        if words:
            found.append(f"along axis {axis} of {length} {words}")
    return f"; it is wrong {' and '.join(found)}" if found else ""


def places(wrong: list[int], length: int) -> str:
    """The places, in words, where they tell something: a stretch, or fewer than half."""
    first, last = wrong[0], wrong[-1]
    if len(wrong) < last - first + 1:
        shown = ", ".join(map(str, wrong[:4]))
        more = ", …" * (len(wrong) > 4)
        return f"at {shown}{more} only" if len(wrong) <= length // 2 else ""
    if len(wrong) > MOST * length:
        return ""
    if last == length - 1 and first != last:
        return f"only from {first} on"
    if first == last:
        return f"only at {first}"
    return f"only up to {last}" if first == 0 else f"only from {first} to {last}"


def narrow_dtype(x: Tensor) -> torch.dtype | None:
    """The narrower dtype that holds all numbers of a tensor as they are, or None: such numbers have
    been rounded to it on their way."""
    if not x.numel() or not x.is_floating_point() or not (x != x.round()).any():
        return None
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        narrower = dtype.itemsize < x.element_size()
        if narrower and torch.equal(x.to(dtype).to(x.dtype), x):
            return dtype
    return None
