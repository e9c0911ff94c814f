"""Flat tokens: the shards of one split read as one long array of tokens.

The shards stand behind each other without a gap; token n of the split is token n - begins[s] of
shard s. A stretch that lies inside one shard is a view of its memory map, one that crosses into
the next shard is the only thing that is ever copied. Document boundaries come from the shards'
offsets by binary search, so a read costs O(rows · log documents), wherever it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanolm.data.shards import Shard

Stretch = tuple[np.ndarray, np.ndarray]
"""Tokens (uint16|uint32), and the offsets among them at which a document begins (int64), with 0."""

AT_ZERO = np.zeros(1, dtype=np.int64)
AT_ZERO.flags.writeable = False  # shared by all rows that lie inside one document


class FlatTokens:
    """One token array over many shards; `total` is its length."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        lengths = [len(shard.tokens) for shard in self.shards]
        self.total = sum(lengths)
        self._begins = np.cumsum([0, *lengths[:-1]])

    def read(self, firsts: np.ndarray, span: int) -> list[Stretch]:
        """For every start in `firsts` (int64, in range(total)): up to `span` tokens from there.

        A stretch is shorter only where the tokens end.
        """
        homes = (np.searchsorted(self._begins, firsts, side="right") - 1).tolist()
        if homes and homes.count(homes[0]) == len(homes):
            return self._read_from(homes[0], firsts, span)
        stretches: list[Stretch] = [(AT_ZERO, AT_ZERO)] * len(homes)
        for home in set(homes):
            places = [i for i, other in enumerate(homes) if other == home]
            found = self._read_from(home, firsts[places], span)
            for place, stretch in zip(places, found, strict=True):
                stretches[place] = stretch
        return stretches

    def _read_from(self, home: int, firsts: np.ndarray, span: int) -> list[Stretch]:
        """The stretches that begin in shard `home`."""
        shard = self.shards[home]
        begins = firsts - self._begins[home]
        ends = np.minimum(begins + span, len(shard.tokens))
        # Keys of the offsets' own type: with another, searchsorted would copy all offsets first.
        kind = shard.offsets.dtype
        low = np.searchsorted(shard.offsets, begins.astype(kind), side="right")
        high = np.searchsorted(shard.offsets, ends.astype(kind), side="left")
        stretches = []
        for begin, end, first, last in zip(
            begins.tolist(), ends.tolist(), low.tolist(), high.tolist(), strict=True
        ):
            starts = AT_ZERO
            if first < last:
                starts = np.zeros(1 + last - first, dtype=np.int64)
                np.subtract(shard.offsets[first:last], begin, out=starts[1:])
            stretch = shard.tokens[begin:end], starts
            if end - begin < span and home + 1 < len(self.shards):
                stretch = self._continued(stretch, home + 1, span - (end - begin))
            stretches.append(stretch)
        return stretches

    def _continued(self, stretch: Stretch, home: int, missing: int) -> Stretch:
        """A stretch with the next tokens of shard `home` (and on) behind it: a copy."""
        tokens, starts = stretch
        begin = self._begins[home : home + 1]
        if begin[0] == self.total:
            return stretch
        more, more_starts = self.read(begin, missing)[0]
        return np.concatenate([tokens, more]), np.concatenate([starts, more_starts + len(tokens)])
