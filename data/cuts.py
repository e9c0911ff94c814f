"""Where rows begin and end in the flat tokens of a corpus: every so many tokens, or at sentences.

A cut has `blocks`, the number of rows, and says of their numbers (int64, in range(blocks)) where
they begin; what was read from there, `span` tokens or fewer where the corpus ends, it shortens to
the row's own. Both cuts depend on the corpus alone, so all ranks, workers and restarts share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from nanolm.data.flat import FlatTokens, Stretch
from nanolm.data.rows import RowBlock
from nanolm.data.shards.directory import Shard


class Cut(Protocol):
    """How a corpus is cut in rows."""

    blocks: int

    def firsts(self, blocks: np.ndarray) -> np.ndarray:
        """int64: the first token of each of these rows."""

    def shorten(self, blocks: np.ndarray, stretches: list[Stretch]) -> list[Stretch]:
        """What was read for these rows, without what is not theirs."""

    def shorten_block(self, blocks: np.ndarray, block: RowBlock) -> RowBlock:
        """The same for rows that were read together."""


class EvenRows:
    """Row k begins at token k stride and reads span tokens.

    partial=False drops a row whose span would overrun the end; partial=True keeps it, shorter.
    """

    def __init__(self, flat: FlatTokens, stride: int, span: int, partial: bool) -> None:
        self.stride = stride
        if partial:
            # Rows until the last token is read; what a row only looks ahead at is not its own.
            self.blocks = -(-(flat.total - (span - stride)) // stride)
        else:
            self.blocks = (flat.total - span) // stride + 1

    def firsts(self, blocks: np.ndarray) -> np.ndarray:
        """int64: the first token of each of these rows."""
        return blocks * self.stride

    def shorten(self, blocks: np.ndarray, stretches: list[Stretch]) -> list[Stretch]:
        """All that was read is the row's own."""
        return stretches

    def shorten_block(self, blocks: np.ndarray, block: RowBlock) -> RowBlock:
        """All that was read is the row's own."""
        return block


class SentenceRows:
    """Rows of whole sentences, as many as fit in stride tokens: FULL-SENTENCES of Liu et al. 2019b,
    section 4.2. A row goes on in the next document, behind the end of the last one; a sentence
    longer than a row is cut.

    Each row reads the span - stride tokens behind it too, which it looks ahead at; the last one
    ends where the corpus does, so `partial` changes nothing. Raises UserError for shards without
    sentences. Opening reads all sentences once: 8 bytes a row stay in memory.
    """

    def __init__(self, flat: FlatTokens, stride: int, span: int, partial: bool) -> None:
        del partial
        self.ahead = span - stride
        bounds = row_bounds(flat.shards, stride)
        # What a row looks ahead at stands behind it, so the last tokens are nobody's own.
        end = flat.total - self.ahead
        self._bounds = np.append(bounds[bounds < end], end) if end > 0 else bounds[:1]
        self.blocks = len(self._bounds) - 1

    def firsts(self, blocks: np.ndarray) -> np.ndarray:
        """int64: the first token of each of these rows."""
        return self._bounds[blocks]

    def lengths(self, blocks: np.ndarray) -> np.ndarray:
        """int64: the tokens that each of these rows reads."""
        return self._bounds[blocks + 1] - self._bounds[blocks] + self.ahead

    def shorten(self, blocks: np.ndarray, stretches: list[Stretch]) -> list[Stretch]:
        """The rows up to their last sentence."""
        lengths = self.lengths(blocks).tolist()
        return [
            (tokens[:length], starts[starts < length])
            for (tokens, starts), length in zip(stretches, lengths, strict=True)
        ]

    def shorten_block(self, blocks: np.ndarray, block: RowBlock) -> RowBlock:
        """The same for rows that were read together."""
        return block.shortened(self.lengths(blocks))


def row_bounds(shards: Sequence[Shard], longest: int) -> np.ndarray:
    """int64 [rows + 1]: where rows of at most `longest` tokens begin, and where the last one ends.

    Every bound is the last beginning of a sentence within `longest` tokens of the bound before; in
    a sentence longer than that it is `longest` tokens further. One shard is looked at at a time.
    """
    found: list[np.ndarray] = []
    open_row = np.zeros(0, np.int64)  # places from the beginning of the row that is not full yet
    begin = 0
    for shard in shards:
        if not len(shard):
            continue
        places = np.concatenate([open_row, begin + shard.sentence_starts()])
        begin += len(shard.tokens)
        places = split_long(np.append(places, begin), longest)
        steps = places.searchsorted(places + longest, side="right") - 1
        last = len(places) - 1  # the shard's end, where the next document begins
        rows, following = [0], steps.tolist()
        while following[rows[-1]] < last:
            rows.append(following[rows[-1]])
        found.append(places[rows[:-1]])
        open_row = places[rows[-1] : -1]
    return np.concatenate([*found, open_row[:1], [begin]])


def split_long(places: np.ndarray, longest: int) -> np.ndarray:
    """The places, and between any two that are further apart than `longest` one after every so
    many tokens."""
    gaps = np.diff(places)
    pieces = np.append(-(-gaps // longest), 1)
    if len(gaps) == 0 or pieces.max() == 1:
        return places
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.repeat(places, pieces) + within * longest


CUTS: dict[str | None, Callable[[FlatTokens, int, int, bool], Cut]] = {
    None: EvenRows,
    "sentences": SentenceRows,
}
"""By the value of data.rows."""
