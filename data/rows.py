"""A row, the unit that training reads, and the arrays that a batch of plain rows becomes.

A row is a stretch of the flat token stream; it may hold the end of one document, some whole ones
and the beginning of another. `fill_blocks` turns B rows into the four arrays of a causal model,

    tokens[b, t] = row_b[t]          targets[b, t] = row_b[t + 1]
    documents[b, t] = how many documents began in row b before or at t, counted from 0
    positions[b, t] = t - (where that document begins in the row)

Shapes: B rows, T positions. Rows come from `nanolm.data.stream`, batches go to the loader.
"""

from __future__ import annotations

import dataclasses

import numpy as np

IGNORED = -100
"""Target of a position that is not predicted; the same as `nanolm.objectives.base.IGNORED`."""
NO_DOCUMENT = -1
"""Document index of padding: padding sees, and is seen by, padding only."""


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """One row: `tokens` [span] uint16|uint32 (a view of the shard where it does not cross two) and
    `starts` int64, the offsets in the row at which a document begins, always with 0 in front.

    `row_id` is unique per block over all corpora of the stream; with `epoch` it keys every random
    choice that is made about the row.
    """

    tokens: np.ndarray
    starts: np.ndarray
    corpus: int
    block: int
    epoch: int
    row_id: int


def fill_blocks(
    rows: list[Row], length: int, with_documents: bool = True
) -> dict[str, np.ndarray]:
    """tokens, targets and, unless told otherwise, positions and documents: int64 [B, T = length].

    A row of fewer than T + 1 tokens (the last of an evaluation) is padded: token 0, target IGNORED,
    document NO_DOCUMENT. Raises ValueError when there are no rows.
    """
    raw, lengths = _side_by_side(rows, length + 1)
    blocks = {
        "tokens": raw[:, :-1].astype(np.int64),
        "targets": raw[:, 1:].astype(np.int64),
    }
    if with_documents:
        blocks["positions"], blocks["documents"] = _documents(rows, length)
    for b in np.flatnonzero(lengths <= length):
        blocks["targets"][b, max(lengths[b] - 1, 0) :] = IGNORED
        if with_documents:
            blocks["documents"][b, lengths[b] :] = NO_DOCUMENT
    return blocks


def _side_by_side(rows: list[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw tokens of all rows [B, width], zeros behind short ones, and each row's length [B].

    One `concatenate` of the views is one call into C; the cast to int64 follows in two more.
    """
    pieces = [row.tokens for row in rows]
    lengths = np.array([len(piece) for piece in pieces])
    if lengths.min() == lengths.max() == width:
        return np.concatenate(pieces).reshape(-1, width), lengths
    raw = np.zeros((len(rows), width), dtype=pieces[0].dtype)
    for line, piece in zip(raw, pieces, strict=True):
        line[: len(piece)] = piece[:width]
    return raw, lengths


def _documents(rows: list[Row], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Restarting positions and document indices, int64 [B, T].

    Most rows hold one document: all of the batch is filled as if every row did, and only the places
    behind a further start are then written again.
    """
    positions = np.empty((len(rows), length), dtype=np.int64)
    positions[:] = np.arange(length)
    documents = np.zeros((len(rows), length), dtype=np.int64)
    for b, row in enumerate(rows):
        if len(row.starts) > 1:
            _restart(positions[b], documents[b], row.starts)
    return positions, documents


def _restart(positions_T: np.ndarray, documents_T: np.ndarray, starts: np.ndarray) -> None:
    """Write the positions and documents of one row that holds several documents."""
    starts = starts[starts < len(positions_T)]
    ends = np.append(starts[1:], len(positions_T))
    documents_T[:] = np.repeat(np.arange(len(starts)), ends - starts)
    positions_T -= np.repeat(starts, ends - starts)
