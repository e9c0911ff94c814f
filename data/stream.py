"""The stream: rows of one or several corpora, in an order that is computed, never stored.

The flat tokens of a corpus are cut in blocks of `stride` tokens; row k reads `span >= stride`
tokens from the beginning of block k (a causal model of length T needs stride T and span T + 1, so
that every token is a target exactly once). With `cut="sentences"` blocks are whole sentences, of at
most `stride` tokens, and rows are shorter by as many. Global row g of training is found in four
steps:

    schedule      step, rank  -> g
    mixture       g           -> corpus c, the rank k of this row among the rows of c
    permutation   k           -> epoch e = k // n_c, block = permutation_{seed, c, e}(k mod n_c)
    flat tokens   block       -> a view of the shard, and where documents begin in it

All four are O(1): starting at step 10^6 does the same work as starting at step 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nanolm.config.schema import CacheConfig
from nanolm.data.cuts import CUTS, Cut
from nanolm.data.flat import FlatTokens
from nanolm.data.mixture import Mixture
from nanolm.data.object_store import is_remote
from nanolm.data.permutation import Permutation, fold_key
from nanolm.data.rows import Row, RowBlock, fill_blocks
from nanolm.data.schedule import shard_rows, share_of
from nanolm.data.shards.directory import open_split
from nanolm.errors import UserError

__all__ = ["Places", "Row", "RowBlock", "RowStream", "fill_blocks", "shard_rows", "share_of"]

LONGEST_PAGE = 4096
"""Rows that are located at once: a permutation costs as much for one row as for hundreds."""
EVALUATION_PIECE = 64
"""Rows that `eval_rows` reads at once."""


class Places(NamedTuple):
    """Where rows stand: int64 arrays of equal length."""

    corpus: np.ndarray
    block: np.ndarray
    epoch: np.ndarray
    row_id: np.ndarray
    first: np.ndarray
    """The row's first token in its corpus."""


class RowStream:
    """The rows of a split.

    corpora: (prepared directory or s3://bucket/prefix, weight) pairs; cache: where this node keeps
    blocks of the latter; read_ahead: micro-batches to `expect` before they are read. partial=False
    (training) drops a block whose span would overrun the end; partial=True (evaluation) keeps the
    last row, shorter than span, so that every token of the split is read. cut: what rows end at, a
    name of `CUTS`.

    `len(stream)` is the number of rows in one pass over all
    corpora, `blocks` the number in each, `tokens` the total of tokens; `manifests` are the
    corpora's. A stream can be pickled: the copy opens the same files again.

    Raises UserError when the corpora have different tokenizers, one has not a single row, or its
    shards do not say what the cut must know.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[str, float]],
        split: str,
        *,
        stride: int,
        span: int,
        seed: int,
        partial: bool = False,
        cache: CacheConfig | None = None,
        cut: str | None = None,
    ) -> None:
        if not 1 <= stride <= span:
            raise ValueError(f"a row reads span={span} tokens and advances stride={stride}")
        if not corpora:
            raise UserError("data.corpora is empty: name at least one prepared directory")
        self.corpora, self.split = [(str(where), weight) for where, weight in corpora], split
        self.stride, self.span, self.seed, self.partial = stride, span, seed, partial
        self.mixture = Mixture([weight for _, weight in corpora])
        opened = [open_split(where, split, cache=cache) for where, _ in corpora]
        self.remote = any(is_remote(where) for where, _ in self.corpora)
        self.read_ahead = (cache or CacheConfig()).read_ahead if self.remote else 0
        self.manifests = [manifest for manifest, _ in opened]
        self._flat = [FlatTokens(shards) for _, shards in opened]
        self._check_tokenizers()
        self._cuts: list[Cut] = [CUTS[cut](flat, stride, span, partial) for flat in self._flat]
        self.blocks = [self._count_blocks(corpus) for corpus in range(len(corpora))]
        self.tokens = sum(flat.total for flat in self._flat)
        self._first_id = np.cumsum([0, *self.blocks])
        # Each epoch of each corpus in a page costs a permutation: tiny corpora get short pages.
        self._page_rows = min(LONGEST_PAGE, 4 + 4 * min(self.blocks))
        self._page: tuple[int, Places] | None = None

    def __len__(self) -> int:
        return sum(self.blocks)

    def row(self, g: int) -> Row:
        """Row g of training, g = 0, 1, 2, … without end."""
        return self.rows(g, g + 1)[0]

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows [start, stop) of training, in order."""
        return self.read(self.places(start, stop))

    def places(self, start: int, stop: int) -> Places:
        """Where rows [start, stop) of training stand: arithmetic only, nothing is read."""
        number, offset = divmod(start, self._page_rows)
        part = slice(offset, offset + stop - start)
        page = self._page_of(number)
        if part.stop > self._page_rows:  # beyond the page's end
            rest = self.places((number + 1) * self._page_rows, stop)
            return Places(*[np.concatenate([a[part], b]) for a, b in zip(page, rest, strict=True)])
        return Places(*[values[part] for values in page])

    def places_of(self, row_ids: np.ndarray, epoch: int = 0) -> Places:
        """Where the rows with these ids (int64, in range(len(stream))) stand."""
        corpus = np.searchsorted(self._first_id, row_ids, side="right") - 1
        block = row_ids - self._first_id[corpus]
        return self._places(corpus, block, np.full(len(row_ids), epoch))

    def read(self, places: Places) -> list[Row]:
        """The rows that stand at these places, as views of the shards."""
        stretches: list = [None] * len(places.corpus)
        for corpus, chosen in self._by_corpus(places):
            found = self._flat[corpus].read(places.first[chosen], self.span)
            found = self._cuts[corpus].shorten(places.block[chosen], found)
            for place, stretch in zip(chosen.tolist(), found):
                stretches[place] = stretch
        names = [values.tolist() for values in places[:4]]
        return [Row(*stretch, *name) for stretch, *name in zip(stretches, *names)]

    def expect(self, start: int, stop: int) -> None:
        """Told that rows [start, stop) of training will be read soon."""
        places = self.places(start, stop)
        for corpus, chosen in self._by_corpus(places):
            self._flat[corpus].expect(places.first[chosen], self.span)

    def read_block(self, places: Places) -> RowBlock:
        """The same rows as one block, [rows, span], much faster than row by row."""
        if len(self._flat) == 1:
            return self._read_block(0, places.block, places.first)
        block = RowBlock.empty(len(places.corpus), self.span, self._flat[0].dtype)
        for corpus, chosen in self._by_corpus(places):
            own = self._read_block(corpus, places.block[chosen], places.first[chosen])
            block.put_block(chosen, own)
        return block

    def eval_rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Rows [start, stop) in natural order, epoch 0: corpus by corpus, block by block.

        The number of a row in this order is its `row_id`.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        for first in range(start, stop, EVALUATION_PIECE):
            ids = np.arange(first, min(first + EVALUATION_PIECE, stop))
            yield from self.read(self.places_of(ids))

    def draw(self, row: Row, k: int) -> Row:
        """The k-th keyed other row of the same corpus: a function of (seed, epoch, row id, k).

        It is never the same block. Raises UserError when the corpus has only one row.
        """
        others = self.blocks[row.corpus] - 1
        if others < 1:
            raise UserError(
                f"the {self.split} split of {self.corpora[row.corpus][0]} has a single row, and "
                "another one is to be drawn: prepare more text or shorten data.row_length"
            )
        other = fold_key(self.seed, row.epoch, row.row_id, k) % others
        other += other >= row.block
        row_id = self._first_id[row.corpus : row.corpus + 1] + other
        return self.read(self.places_of(row_id, row.epoch))[0]

    def _page_of(self, number: int) -> Places:
        """Places of the rows of one page; the last page is kept."""
        if self._page is None or self._page[0] != number:
            first = number * self._page_rows
            self._page = number, self._locate(np.arange(first, first + self._page_rows))
        return self._page[1]

    def _locate(self, rows: np.ndarray) -> Places:
        corpora, ranks = self.mixture.locate(rows)
        epochs, blocks = np.divmod(ranks, np.array(self.blocks)[corpora])
        for corpus in range(len(self.blocks)):
            here = np.flatnonzero(corpora == corpus)
            # Ranks ascend, so the rows of one epoch are neighbours.
            cuts = np.flatnonzero(np.diff(epochs[here])) + 1
            for part in np.split(here, cuts) if len(here) else ():
                key = (self.seed, corpus, int(epochs[part[0]]))
                blocks[part] = Permutation(self.blocks[corpus], key)(blocks[part])
        return self._places(corpora, blocks, epochs)

    def _places(self, corpus: np.ndarray, block: np.ndarray, epoch: np.ndarray) -> Places:
        first = np.empty_like(block)
        for number, cut in enumerate(self._cuts):
            here = corpus == number
            first[here] = cut.firsts(block[here])
        return Places(corpus, block, epoch, self._first_id[corpus] + block, first)

    def _read_block(self, corpus: int, blocks: np.ndarray, firsts: np.ndarray) -> RowBlock:
        found = self._flat[corpus].read_block(firsts, self.span)
        return self._cuts[corpus].shorten_block(blocks, found)

    def _by_corpus(self, places: Places) -> Iterator[tuple[int, np.ndarray]]:
        """Each corpus with the numbers of those places that are in it."""
        for corpus in range(len(self._flat)):
            chosen = np.flatnonzero(places.corpus == corpus)
            if len(chosen):
                yield corpus, chosen

    def _count_blocks(self, corpus: int) -> int:
        blocks, total = self._cuts[corpus].blocks, self._flat[corpus].total
        if blocks < 1:
            raise UserError(
                f"the {self.split} split of {self.corpora[corpus][0]} has {total} tokens, too few "
                f"for one row of {self.span}: prepare more text or shorten data.row_length"
            )
        return blocks

    def _check_tokenizers(self) -> None:
        for (where, _), manifest in zip(self.corpora[1:], self.manifests[1:], strict=True):
            if manifest.tokenizer_hash != self.manifests[0].tokenizer_hash:
                raise UserError(
                    f"{where} was prepared with another tokenizer than {self.corpora[0][0]}: "
                    "prepare it again with --tokenizer and the first one's model"
                )
