"""Mask: who may attend to whom, as data that can be drawn, never as a [B, 1, T, S] tensor.

A mask is the conjunction of small conditions on a query index t and a key index s. With t' =
t + (S - T), the query's index among the keys (bottom-right alignment, so that T queries that extend
a cache of S - T keys see what they should):

    causal      s <= t', or s < prefix_lengths[b]       (prefix-LM: Raffel et al. 2020, 3.2)
    window      |t' - s| < window                        (Beltagy et al. 2020)
    lengths     s < key_lengths[b]                       (padding)
    documents   documents[b, t] == key_documents[b, s]   (packed rows)
    order       key_order[b, s] <= order[b, t], or <     (permutation LM: Yang et al. 2019)

A window counts one side: without causal a query sees up to 2 window - 1 keys, with itself in the
middle; with causal it sees the last `window`, itself among them. (Beltagy et al. count both sides.)

`dense` is the definition: every kernel is tested against it. Kernels read the fields.

Shapes: B batch, T queries, S keys.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

LengthGroups = tuple[tuple[int, int], ...]
"""(number, length) of sequences that fill a row end to end, ascending in length."""
KINDS = ("causal", "window", "lengths", "documents", "prefix", "order")


class Ranges(NamedTuple):
    """What documents and order leave to be looked at, as `nanolm.ops.matching` finds it.

    keys     int32 [B, 2, T]: for each query the first key that it could match, and the one past the
             last; (S, 0) where there is none
    queries  int32 [B, 2, S]: the same for each key, which backward passes alone read

    Either may be None, queries where gradients were off: then nothing is skipped for it.
    """

    keys: Tensor | None
    queries: Tensor | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys each query may see; all integer tensors are int64 or int32.

    Fields that are None (or False) do not restrict anything.
    """

    causal: bool = False
    window: int | None = None
    key_lengths: Tensor | None = None  # [B]
    documents: Tensor | None = None  # [B, T]
    key_documents: Tensor | None = None  # [B, S]; None means documents (T == S)
    prefix_lengths: Tensor | None = None  # [B], used with causal
    order: Tensor | None = None  # [B, T]
    key_order: Tensor | None = None  # [B, S]; None means order
    strict: bool = False  # order: < (the query stream of XLNet) instead of <=
    # A field for CPU kernels alone. It may not leave the core: it is known where a row is packed
    # (finetune/tasks) and read where it is attended, and a Mask is all that travels between the
    # two.
    # No condition of its own: documents again, for kernels that run length by length. Only where
    # the one row of the batch is full of documents, each of which lies in one piece.
    length_groups: LengthGroups | None = None
    # Not given and never copied by `dataclasses.replace`: a mask that is made from another one has
    # other documents, rows or lengths, and finds its own. Only `at` takes them along.
    ranges: Ranges | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def kinds(self) -> frozenset[str]:
        """The names, out of KINDS, of the conditions that this mask has."""
        present = {
            "causal": self.causal,
            "window": self.window is not None,
            "lengths": self.key_lengths is not None,
            "documents": self.documents is not None,
            "prefix": self.prefix_lengths is not None,
            "order": self.order is not None,
        }
        return frozenset(kind for kind in KINDS if present[kind])

    def at(self, *, causal: bool, window: int | None) -> Mask:
        """This mask in a layer that is causal or not and has a sliding window or not."""
        layers_own = dataclasses.replace(self, causal=causal, window=window)
        # Ranges are those of documents and order alone, which are the same in every layer.
        return layers_own if self.ranges is None else layers_own.keeping(self.ranges)

    def keeping(self, ranges: Ranges) -> Mask:
        """A copy of this mask beside which its own ranges are kept (see `nanolm.ops.matching`)."""
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "ranges", ranges)
        return copy

    def dense(self, n_queries: int, n_keys: int, device: torch.device | str = "cpu") -> Tensor:
        """The definition: bool [B or 1, 1, T, S], True where the query may see the key."""
        # What each condition costs a kernel: causal, window, lengths and prefixes are bounds of its
        # loops, so hidden tiles are never visited and only tiles on a boundary compare indices.
        # Documents and order are numbers in memory: a program bounds its loop by the ranges of its
        # own rows, and compares numbers in every tile that is left.
        t = torch.arange(n_queries, device=device)[:, None] + (n_keys - n_queries)
        s = torch.arange(n_keys, device=device)[None, :]
        allowed = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=device)
        if self.causal:
            causal = (s <= t)[None, None]
            if self.prefix_lengths is not None:
                causal = causal | (s < self.prefix_lengths[:, None, None])[:, None]
            allowed = allowed & causal
        if self.window is not None:
            allowed = allowed & ((t - s).abs() < self.window)[None, None]
        if self.key_lengths is not None:
            allowed = allowed & (s < self.key_lengths[:, None, None])[:, None]
        if self.documents is not None:
            keys = self.documents if self.key_documents is None else self.key_documents
            allowed = allowed & (self.documents[:, :, None] == keys[:, None, :])[:, None]
        if self.order is not None:
            keys = self.order if self.key_order is None else self.key_order
            before = torch.lt if self.strict else torch.le
            allowed = allowed & before(keys[:, None, :], self.order[:, :, None])[:, None]
        return allowed
