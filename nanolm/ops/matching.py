"""Which keys a query could match by documents and order, and which queries a key: once a batch.

Where documents end and what comes first in an order is not arithmetic, and a kernel that wants to
skip tiles has to know it. Found by sorting, before the layers, it is two numbers a row

    first    the first one of the other side that matches        (their number where none does)
    end      one past the last                                   (0 where none does)

and a tile's range is the smallest `first` and the largest `end` of its rows. Windows, causality and
lengths are left to the kernels: a window differs from layer to layer, and all of them are bounds
that need no memory.

Time O((T + S) log (T + S)), memory O(T + S): nothing here is [T, S].

Shapes: B batch, T queries, S keys; in `by_document` and `by_order` R rows and N others.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nanolm.ops.masks import Mask, Ranges

BITS = 32
LOW, HIGH = -(2**31), 2**31 - 1


def with_ranges(mask: Mask) -> Mask:
    """The mask with its ranges beside it, found unless they are there already; a mask without
    documents and order has none."""
    if mask.ranges is not None or (mask.documents is None and mask.order is None):
        return mask
    return mask.keeping(ranges_of(mask))


def ranges_of(mask: Mask) -> Ranges:
    """The ranges of a mask with documents, an order or both. Those of keys, which backward passes
    read, are left out while gradients are off."""
    key_documents = mask.documents if mask.key_documents is None else mask.key_documents
    key_order = mask.order if mask.key_order is None else mask.key_order
    find = by_document if mask.order is None else by_order
    keys = find(
        joined(mask.documents, mask.order, below=mask.strict), joined(key_documents, key_order)
    )
    if not torch.is_grad_enabled():
        return Ranges(keys, None)
    # A key is seen by what comes after it: the same question with the order turned round. ~x is
    # -x - 1, and does not overflow.
    after = None if mask.order is None else ~mask.order
    key_after = None if key_order is None else ~key_order
    queries = find(
        joined(key_documents, key_after, below=mask.strict), joined(mask.documents, after)
    )
    return Ranges(keys, queries)


def joined(documents: Tensor | None, order: Tensor | None, *, below: bool = False) -> Tensor:
    """int64 [B, N]: a document and a place in one number, so that numbers sort by documents first;
    with `below` the place before."""
    # Exact for numbers of 32 bits. Of wider ones documents may fall together and places be cut off,
    # both of which make a range wider and never too narrow; that is why a strict order is one less
    # before it is cut, and not a strict comparison behind it.
    if order is None:
        return cast(Tensor, documents).long() << BITS
    place = (order.long() - int(below)).clamp(LOW, HIGH) - LOW
    return place if documents is None else (documents.long() << BITS) + place


def in_rows(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many batch rows, contiguous: what searchsorted takes."""
    n_rows = max(rows.shape[0], others.shape[0])
    return rows.expand(n_rows, -1).contiguous(), others.expand(n_rows, -1).contiguous()


def beginning(numbers: Tensor) -> Tensor:
    """The lowest number of the same document."""
    return numbers >> BITS << BITS


def by_document(rows_BR: Tensor, others_BN: Tensor) -> Tensor:
    """int32 [B, 2, R]: the first and one past the last other of each row's document."""
    rows_BR, others_BN = in_rows(rows_BR, others_BN)
    sorted_BN, at_BN = others_BN.sort(dim=1, stable=True)
    # Equal numbers stay in the order of their places, so a document's first and last stand first
    # and last.
    begin_BR = torch.searchsorted(sorted_BN, rows_BR)
    stop_BR = torch.searchsorted(sorted_BN, rows_BR, right=True)
    first_BR, last_BR = taken(at_BN, begin_BR), taken(at_BN, stop_BR - 1)
    return where_any(first_BR, last_BR, stop_BR > begin_BR, others_BN.shape[1])


def by_order(rows_BR: Tensor, others_BN: Tensor) -> Tensor:
    """int32 [B, 2, R]: the first and one past the last other of each row's document that comes no
    later in the order."""
    rows_BR, others_BN = in_rows(rows_BR, others_BN)
    n_others = others_BN.shape[1]
    sorted_BN, at_BN = others_BN.sort(dim=1)
    begin_BR = torch.searchsorted(sorted_BN, beginning(rows_BR))
    stop_BR = torch.searchsorted(sorted_BN, rows_BR, right=True)
    # What matches stands together, from the beginning of the document to the row's own place: the
    # extremes so far, of each document by itself, since every next one starts above all of the one
    # before.
    base_BN = torch.searchsorted(sorted_BN, beginning(sorted_BN)) * n_others
    last_BN = (base_BN + at_BN).cummax(dim=1).values
    first_BN = (base_BN + (n_others - 1 - at_BN)).cummax(dim=1).values
    base_BR = begin_BR * n_others
    last_BR = taken(last_BN, stop_BR - 1) - base_BR
    first_BR = n_others - 1 - (taken(first_BN, stop_BR - 1) - base_BR)
    return where_any(first_BR, last_BR, stop_BR > begin_BR, n_others)


def taken(values_BN: Tensor, at_BR: Tensor) -> Tensor:
    """[B, R]: the values at these places; anything where a place is outside."""
    n_values = values_BN.shape[1]
    if n_values == 0:
        return at_BR
    return values_BN.gather(1, at_BR.clamp(0, n_values - 1))


def where_any(first_BR: Tensor, last_BR: Tensor, any_BR: Tensor, n_others: int) -> Tensor:
    """int32 [B, 2, R]: (first, last + 1), or (n_others, 0) where there is none."""
    first_BR = torch.where(any_BR, first_BR, n_others)
    end_BR = torch.where(any_BR, last_BR + 1, 0)
    return torch.stack([first_BR, end_BR], dim=1).int()
