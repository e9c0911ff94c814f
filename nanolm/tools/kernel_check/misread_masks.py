"""Masks that are read wrongly in a known way: what then is shown.

Shapes: B batch, T queries, S keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolm.ops.masks import Mask


def without(mask: Mask, *fields: str, **others: Any) -> Mask:
    """The mask with some fields as if they had not been given."""
    left_out: dict[str, Any] = dict.fromkeys(fields)
    return dataclasses.replace(mask, **left_out, **others)


class Shown:
    """What a wrong reading of a mask lets be seen, as the definition asks for it."""

    def __init__(self, allowed: Tensor) -> None:
        self.allowed = allowed

    def dense(self, *_: Any) -> Tensor:
        """bool [B or 1, 1, T, S]."""
        return self.allowed

    @classmethod
    def by(cls, reading: Reading, mask: Mask, n_queries: int, n_keys: int) -> Shown:
        """The mask in a wrong reading."""
        return cls(reading(mask, n_queries, n_keys))


T = TypeVar("T")
Reading = Callable[[Mask, int, int], Tensor]


def prefix_of(mask: Mask, n_keys: int) -> Tensor:
    """bool [B, 1, 1, S]: the keys of the prefix; AttributeError where there is none."""
    lengths = given(mask.prefix_lengths)
    return torch.arange(n_keys, device=lengths.device) < lengths[:, None, None, None]


def given(x: T | None) -> T:
    """A field that is there; AttributeError says that there is nothing to misread."""
    if x is None:
        raise AttributeError("this mask does not have it")
    return x


def prefix_despite(*fields: str) -> Reading:
    """The prefix is seen whatever these say."""

    def reading(mask: Mask, n: int, m: int) -> Tensor:
        seen = prefix_of(mask, m)
        rest = without(mask, *fields, causal=False)
        return mask.dense(n, m, seen.device) | (seen & rest.dense(n, m, seen.device))

    return reading


def aligned_to_lengths(mask: Mask, n: int, m: int) -> Tensor:
    """Queries stand at the end of a row's own keys."""
    ends = given(mask.key_lengths)
    rest = without(mask, "window", causal=False).dense(n, m, ends.device)
    t = torch.arange(n, device=ends.device)[:, None] + (ends[:, None, None] - n)
    s = torch.arange(m, device=ends.device)
    seen = s <= t if mask.causal else torch.ones_like(s <= t)
    seen = seen if mask.window is None else seen & ((t - s).abs() < mask.window)
    return rest & seen[:, None]


def numbers_as(change: Callable[[Tensor], Tensor]) -> Reading:
    """Documents and places after a change of their numbers."""

    def reading(mask: Mask, n: int, m: int) -> Tensor:
        names = ("documents", "key_documents", "order", "key_order")
        there = {name: x for name in names if (x := getattr(mask, name)) is not None}
        changed: dict[str, Any] = {name: change(x) for name, x in there.items()}
        device = given(next(iter(there.values()), None)).device
        return dataclasses.replace(mask, **changed).dense(n, m, device)

    return reading


def runs(x: Tensor) -> Tensor:
    """How often the number has changed up to each place."""
    return F.pad((x[:, 1:] != x[:, :-1]).long(), (1, 0)).cumsum(dim=1)


def ranks(x: Tensor) -> Tensor:
    """Places of which none is shared."""
    return x.argsort(dim=1, stable=True).argsort(dim=1)


def no_negative(mask: Mask, n: int, m: int) -> Tensor:
    """A document below 0 is padding."""
    keys = mask.documents if mask.key_documents is None else mask.key_documents
    return mask.dense(n, m, given(keys).device) & (given(keys) >= 0)[:, None, None]


def no_zero(mask: Mask, n: int, m: int) -> Tensor:
    """A row of 0 keys has no padding."""
    lengths = given(mask.key_lengths)
    return dataclasses.replace(mask, key_lengths=lengths.where(lengths > 0, m)).dense(
        n, m, lengths.device
    )


def whole_tiles(size: int, n_keys: int) -> int:
    """The keys of the tiles of this size that are full."""
    return n_keys // size * size


def first_keys(limit: Callable[[int], int]) -> Reading:
    """No key behind so many is seen."""

    def reading(mask: Mask, n: int, m: int) -> Tensor:
        tensors = [x for x in vars(mask).values() if isinstance(x, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        return mask.dense(n, m, device) & (torch.arange(m, device=device) < limit(m))

    return reading


MASKS: dict[str, Reading] = {
    "it shows the prefix beyond the key lengths (padding)": prefix_despite("key_lengths"),
    "it shows the prefix beyond the window": prefix_despite("window"),
    "it takes a mask with a prefix for causal; a layer may be not": (
        lambda mask, n, m: without(mask, causal=given(mask.prefix_lengths) is not None).dense(
            n, m, given(mask.prefix_lengths).device
        )
    ),
    "it puts queries at the end of a row's own keys (key_lengths); they stand at that of all S": (
        aligned_to_lengths
    ),
    "it takes documents for pieces of a row: one that comes back is the same document": (
        numbers_as(runs)
    ),
    "it takes documents below 0 for padding: they are numbers as others are": no_negative,
    "it holds documents or order in 16 bits": numbers_as(lambda x: x.to(torch.int16)),
    "it holds documents or order in float32, where 2^24 and 2^24 + 1 are one": (
        numbers_as(lambda x: x.float())
    ),
    "it takes the order for a permutation: places that are shared are seen both ways": (
        numbers_as(ranks)
    ),
    "it takes a row of 0 keys for one without padding": no_zero,
    **{
        f"it reads the first {n} keys only": first_keys(functools.partial(min, n))
        for n in (64, 128, 256, 512, 1024)
    },
    **{
        f"it leaves out the keys behind the last whole tile of {n}": first_keys(
            functools.partial(whole_tiles, n)
        )
        for n in (16, 32, 64, 128)
    },
}
"""What a wrong reading of a mask is told."""
