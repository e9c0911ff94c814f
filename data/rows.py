"""Rows, the unit that training reads, and the arrays that a batch of plain rows becomes.

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
NAMES = ("tokens", "targets", "positions", "documents")


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


@dataclasses.dataclass(slots=True, eq=False)
class RowBlock:
    """Many rows as arrays: what a batch needs of them when nothing is done to a single row.

    `tokens` [B, span] uint16|uint32; `short` {row: its length} of the rows that are shorter, with
    zeros behind them; the n-th document that begins inside a row (not at its 0) begins in row
    `start_rows[n]` at offset `start_offsets[n]`, ascending within a row.
    """

    tokens: np.ndarray
    short: dict[int, int] = dataclasses.field(default_factory=dict)
    start_rows: list[int] = dataclasses.field(default_factory=list)
    start_offsets: list[int] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def empty(cls, rows: int, span: int, dtype: np.dtype) -> RowBlock:
        """A block of zeros, to be filled by `put` and `put_block`."""
        return cls(np.zeros((rows, span), dtype))

    @classmethod
    def of(cls, rows: list[Row]) -> RowBlock:
        """The block of these rows, as wide as the longest."""
        block = cls.empty(len(rows), max(len(row.tokens) for row in rows), rows[0].tokens.dtype)
        for b, row in enumerate(rows):
            block.put(b, row.tokens, row.starts)
        return block

    def put(self, b: int, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Write row b."""
        self.tokens[b, : len(tokens)] = tokens
        if len(tokens) < self.tokens.shape[1]:
            self.short[b] = len(tokens)
        self.add_starts(b, starts[1:])

    def put_block(self, rows: np.ndarray, block: RowBlock) -> None:
        """Write the rows of another block of the same width as rows `rows` (int64) of this one."""
        self.tokens[rows] = block.tokens
        names = rows.tolist()
        self.short |= {names[b]: length for b, length in block.short.items()}
        self.start_rows += [names[b] for b in block.start_rows]
        self.start_offsets += block.start_offsets

    def shortened(self, lengths: np.ndarray) -> RowBlock:
        """A copy whose row b has at most lengths[b] (int64) tokens."""
        ends = [min(n, self.short.get(b, n)) for b, n in enumerate(lengths.tolist())]
        width = self.tokens.shape[1]
        inside = np.arange(width) < np.array(ends)[:, None]
        starts = [
            (b, offset)
            for b, offset in zip(self.start_rows, self.start_offsets, strict=True)
            if offset < ends[b]
        ]
        return RowBlock(
            np.where(inside, self.tokens, 0).astype(self.tokens.dtype),
            {b: end for b, end in enumerate(ends) if end < width},
            [b for b, _ in starts],
            [offset for _, offset in starts],
        )

    def add_starts(self, b: int, offsets: np.ndarray) -> None:
        """Note that documents begin in row b at these offsets (all above 0)."""
        self.start_rows += [b] * len(offsets)
        self.start_offsets += offsets.tolist()


def fill_blocks(
    rows: list[Row] | RowBlock, length: int, with_documents: bool = True
) -> dict[str, np.ndarray]:
    """tokens, targets and, unless told otherwise, positions and documents: int64 [B, T = length].

    A row of fewer than T + 1 tokens (the last of an evaluation) is padded: token 0, target IGNORED,
    document NO_DOCUMENT. A longer row is cut. Raises ValueError when there are no rows.
    """
    block = rows if isinstance(rows, RowBlock) else RowBlock.of(rows)
    B, T = len(block), length
    width = min(block.tokens.shape[1], T + 1)
    # One piece of memory for all: the allocator takes and returns it at once.
    arrays = np.empty((4 if with_documents else 2, B, T), dtype=np.int64)
    blocks = dict(zip(NAMES, arrays))
    tokens_BT, targets_BT = arrays[0], arrays[1]
    np.copyto(tokens_BT[:, :width], block.tokens[:, : min(width, T)])
    np.copyto(targets_BT[:, : width - 1], block.tokens[:, 1:width])
    if with_documents:
        _fill_documents(block, *arrays[2:])
    if width <= T:
        tokens_BT[:, width:] = 0
    ends = dict.fromkeys(range(B), width) if width <= T else {}
    for b, n_tokens in (ends | block.short).items():
        targets_BT[b, max(n_tokens - 1, 0) :] = IGNORED
        if with_documents:
            blocks["documents"][b, n_tokens:] = NO_DOCUMENT
    return blocks


def count_targets(targets_BT: np.ndarray) -> int:
    """How many targets are not IGNORED; mostly all, which the lowest of them tells at once."""
    if targets_BT.min() >= 0:
        return targets_BT.size
    return int(np.count_nonzero(targets_BT != IGNORED))


def _fill_documents(block: RowBlock, positions_BT: np.ndarray, documents_BT: np.ndarray) -> None:
    """Write restarting positions and document indices."""
    if len(block.start_rows) > 3 * len(block):
        _fill_many_documents(block, positions_BT, documents_BT)
        return
    # Rows mostly lie inside one long document: all are filled as if they did, and what follows a
    # further start is written again.
    T = positions_BT.shape[1]
    counting = np.arange(T)
    positions_BT[:] = counting
    documents_BT.fill(0)
    for b, start in zip(block.start_rows, block.start_offsets):
        if start < T:
            positions_BT[b, start:] = counting[: T - start]
            rest = documents_BT[b, start:]
            rest += 1


def _fill_many_documents(
    block: RowBlock, positions_BT: np.ndarray, documents_BT: np.ndarray
) -> None:
    """The same from the lengths of all documents of the batch, for when they are short."""
    B, T = positions_BT.shape
    starts = np.array(block.start_offsets)
    inside = starts < T
    rows = np.concatenate([np.arange(B), np.array(block.start_rows)[inside]])
    firsts = rows * T + np.concatenate([np.zeros(B, dtype=np.int64), starts[inside]])
    order = np.argsort(firsts)
    rows, firsts = rows[order], firsts[order]
    lengths = np.diff(firsts, append=B * T)
    indices = np.arange(len(rows)) - np.searchsorted(rows, rows)
    np.subtract(np.arange(B * T), np.repeat(firsts, lengths), out=positions_BT.reshape(-1))
    documents_BT.reshape(-1)[:] = np.repeat(indices, lengths)
