"""Sequences of unequal length in one rectangle, side by side (packed) or one a row (padded).

    in line   one row, by length, nothing but tokens; for attention that runs length by length
    packed    rows as wide as the longest sequence, documents kept apart by a mask
    padded    one sequence a row

Packed, the rectangle is as wide as the longest sequence and sequences share rows: longest first,
each into the fullest row that still has room (best fit decreasing, Johnson 1973: at most 11/9 of
the fewest rows possible, and 4).
Within a row the document mask keeps them apart and positions restart, so the model computes for
each sequence what it would compute for it alone, and hardly anything is spent on padding.

Shapes: S sequences, R rows, T width, M tokens (all sequences end to end).
"""

from __future__ import annotations

import bisect

import numpy as np

from nanolm.data.rows import NO_DOCUMENT


def best_fit(lengths: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, offset) int64[S] of each sequence; deterministic."""
    rows, offsets = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    free: list[tuple[int, int]] = []  # (room left, row), ascending: the fullest first
    n_rows = 0
    for s in sorted(range(len(lengths)), key=lambda s: (-lengths[s], s)):
        place = bisect.bisect_left(free, (lengths[s], 0))
        room, row = free.pop(place) if place < len(free) else (width, n_rows)
        n_rows += row == n_rows
        rows[s], offsets[s] = row, width - room
        if room > lengths[s]:
            bisect.insort(free, (room - lengths[s], row))
    return rows, offsets


def by_length(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(row, offset) int64[S] of each sequence in a single row, the shortest first."""
    order = np.argsort(lengths, kind="stable")
    sorted_lengths = np.asarray(lengths, dtype=np.int64)[order]
    offsets = np.empty(len(lengths), np.int64)
    offsets[order] = np.cumsum(sorted_lengths) - sorted_lengths
    return np.zeros(len(lengths), np.int64), offsets


def rectangle(
    sequences: list[np.ndarray], pad: int, *, packed: bool, in_line: bool = False
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(arrays, index): tokens [R, T] with either documents and positions [R, T] or lengths [R], and
    for the M tokens of all sequences, end to end, their flat index int64[M] in R x T."""
    lengths = [len(sequence) for sequence in sequences]
    width = max(lengths)
    if packed and in_line:
        rows, offsets = by_length(lengths)
        width = sum(lengths)
    elif packed:
        rows, offsets = best_fit(lengths, width)
    else:
        rows, offsets = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    within = np.concatenate([np.arange(length) for length in lengths])
    index = np.repeat(rows * width + offsets, lengths) + within
    shape = (int(rows.max()) + 1, width)
    arrays = {"tokens": scatter(shape, index, np.concatenate(sequences), pad)}
    if packed:
        owner = np.repeat(np.arange(len(lengths)), lengths)
        arrays["documents"] = scatter(shape, index, owner, NO_DOCUMENT)
        arrays["positions"] = scatter(shape, index, within, 0)
    else:
        arrays["lengths"] = np.array(lengths, dtype=np.int64)
    return arrays, index


def scatter(shape: tuple[int, int], index: np.ndarray, values: np.ndarray, fill: int) -> np.ndarray:
    """int64 [R, T] with `values` at the flat places `index` and `fill` elsewhere."""
    flat = np.full(shape[0] * shape[1], fill, dtype=np.int64)
    flat[index] = values
    return flat.reshape(shape)
