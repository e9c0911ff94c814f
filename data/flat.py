"""Flat tokens: the shards of one split read as one long array of tokens.

The shards stand behind each other without a gap; token n of the split is token n - begins[s] of
shard s. A stretch that lies inside one shard is a view of its memory map; one that crosses into
the next shard has to be copied. Document boundaries come from the shards' offsets by binary search,
so a read costs O(rows · log documents), wherever it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanolm.data.rows import RowBlock
from nanolm.data.shards.directory import Shard

Stretch = tuple[np.ndarray, np.ndarray]
"""Tokens (uint16|uint32), and the offsets among them at which a document begins (int64), with 0."""

AT_ZERO = np.zeros(1, dtype=np.int64)
AT_ZERO.flags.writeable = False  # shared by all rows that lie inside one document


class FlatTokens:
    """One token array over many shards; `total` is its length and `dtype` its type."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        lengths = [len(shard.tokens) for shard in self.shards]
        self.total = sum(lengths)
        self.dtype = self.shards[0].tokens.dtype
        self._begins = np.cumsum([0, *lengths[:-1]])

    def __reduce__(self) -> tuple:
        return FlatTokens, (self.shards,)

    def read(self, firsts: np.ndarray, span: int) -> list[Stretch]:
        """For every start in `firsts` (int64, in range(total)): up to `span` tokens from there.

        A stretch is shorter only where the tokens end.
        """
        groups = self._by_shard(firsts)
        if len(groups) == 1:
            return self._read_from(groups[0][0], firsts, span)
        stretches: list[Stretch] = [(AT_ZERO, AT_ZERO)] * len(firsts)
        for home, places in groups:
            for place, stretch in zip(places.tolist(), self._read_from(home, firsts[places], span)):
                stretches[place] = stretch
        return stretches

    def read_block(self, firsts: np.ndarray, span: int) -> RowBlock:
        """The same stretches as one block of width `span`."""
        groups = self._by_shard(firsts)
        if len(groups) == 1:
            return self._block_from(groups[0][0], firsts, span)
        block = RowBlock.empty(len(firsts), span, self.dtype)
        for home, places in groups:
            block.put_block(places, self._block_from(home, firsts[places], span))
        return block

    def expect(self, firsts: np.ndarray, span: int) -> None:
        """Told that these stretches will be read soon; shards in a bucket begin to come."""
        groups = self._by_shard(firsts)
        for home, places in groups:
            chosen = firsts if len(groups) == 1 else firsts[places]
            self.shards[home].expect(chosen - self._begins[home], span, wait=False)

    def _by_shard(self, firsts: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Each shard in which a stretch begins, with the places of those stretches in `firsts`."""
        if len(self.shards) == 1:
            return [(0, firsts)]
        homes = np.searchsorted(self._begins, firsts, side="right") - 1
        return [(home, np.flatnonzero(homes == home)) for home in sorted(set(homes.tolist()))]

    def _block_from(self, home: int, firsts: np.ndarray, span: int) -> RowBlock:
        """The stretches that begin in shard `home`: by one call into numpy, if all end in it."""
        shard, begins = self.shards[home], firsts - self._begins[home]
        if begins.max() + span > len(shard.tokens):
            block = RowBlock.empty(len(firsts), span, self.dtype)
            for b, stretch in enumerate(self._read_from(home, firsts, span)):
                block.put(b, *stretch)
            return block
        block = RowBlock(shard.windows(begins, span))
        low, high = self._document_range(home, begins, begins + span)
        for b in (low < high).nonzero()[0].tolist():
            block.add_starts(b, shard.offsets[low[b] : high[b]] - begins[b])
        return block

    def _read_from(self, home: int, firsts: np.ndarray, span: int) -> list[Stretch]:
        """The stretches that begin in shard `home`."""
        tokens, offsets = self.shards[home].tokens, self.shards[home].offsets
        begins = firsts - self._begins[home]
        ends = np.minimum(begins + span, len(tokens))
        low, high = self._document_range(home, begins, ends).tolist()
        self.shards[home].expect(begins, span)
        stretches = []
        for begin, end, first, last in zip(begins.tolist(), ends.tolist(), low, high):
            starts = AT_ZERO
            if first < last:
                starts = np.zeros(1 + last - first, dtype=np.int64)
                np.subtract(offsets[first:last], begin, out=starts[1:])
            stretch = tokens[begin:end], starts
            if end - begin < span and home + 1 < len(self.shards):
                stretch = self._continued(stretch, home + 1, span - (end - begin))
            stretches.append(stretch)
        return stretches

    def _document_range(self, home: int, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """int64 [2, rows]: the documents [low, high) that begin between `begins` and `ends`."""
        offsets = self.shards[home].offsets
        # Keys of the offsets' own type: with another, searchsorted would copy all offsets first.
        keys = np.empty((2, len(begins)), dtype=offsets.dtype)
        keys[0] = begins
        keys[1] = ends - 1
        return offsets.searchsorted(keys, side="right")

    def _continued(self, stretch: Stretch, home: int, missing: int) -> Stretch:
        """A stretch with the next tokens of shard `home` (and on) behind it: a copy."""
        tokens, starts = stretch
        begin = self._begins[home : home + 1]
        if begin[0] == self.total:
            return stretch
        more, more_starts = self.read(begin, missing)[0]
        return np.concatenate([tokens, more]), np.concatenate([starts, more_starts + len(tokens)])
