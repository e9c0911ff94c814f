"""The stream of a task: items that fit into memory, in an order that is computed.

Global row g of training is item permutation_{seed, epoch}(g mod n) of epoch g // n, so the order is
the same for every number of ranks, needs no state, and seeks in O(1). It offers what the loader
asks of a stream (`places`, `places_of`, `read`, `draw`, `seed`, `len`), as `nanolm.data.stream`
does for tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nanolm.data.mixture import Mixture
from nanolm.data.permutation import Permutation, fold_key
from nanolm.errors import UserError


class TaskPlaces(NamedTuple):
    """Which items, in which epoch: int64 arrays of equal length."""

    epoch: np.ndarray
    row_id: np.ndarray


@dataclasses.dataclass(slots=True, eq=False)
class TaskRow:
    """One item on its way into a batch; (seed, epoch, row_id) keys every random choice about it."""

    item: Any
    epoch: int
    row_id: int


class TaskStream:
    """Endless shuffled epochs over a list of items (`name` is what errors call it)."""

    remote, read_ahead = False, 0
    """Items lie in memory: the loader need not announce them."""

    def __init__(self, items: list[Any], *, seed: int, name: str = "the task's data") -> None:
        if not items:
            raise UserError(f"{name} has no usable row")
        self.items, self.seed, self.name = items, seed, name

    def __len__(self) -> int:
        return len(self.items)

    def places(self, start: int, stop: int) -> TaskPlaces:
        """Where training rows [start, stop) stand."""
        return shuffled(np.arange(start, stop, dtype=np.int64), len(self), self.seed)

    def places_of(self, row_ids: np.ndarray, epoch: int = 0) -> TaskPlaces:
        """The items with these numbers."""
        return TaskPlaces(np.full(len(row_ids), epoch), np.asarray(row_ids, dtype=np.int64))

    def expect(self, start: int, stop: int) -> None:
        """Told that rows [start, stop) of training will be read soon: they lie in memory."""

    def read(self, places: TaskPlaces) -> list[TaskRow]:
        """The rows at these places."""
        pairs = zip(places.epoch.tolist(), places.row_id.tolist())
        return [TaskRow(self.items[row_id], epoch, row_id) for epoch, row_id in pairs]

    def rows(self, start: int, stop: int) -> list[TaskRow]:
        """Training rows [start, stop), in order."""
        return self.read(self.places(start, stop))

    def draw(self, row: TaskRow, k: int) -> TaskRow:
        """The k-th keyed other row; never the row itself. Raises UserError when there is none."""
        if len(self) < 2:
            raise UserError(f"{self.name} has a single row, and another one is to be drawn")
        other = fold_key(self.seed, row.epoch, row.row_id, k) % (len(self) - 1)
        other += other >= row.row_id
        return TaskRow(self.items[other], row.epoch, other)


def shuffled(rows: np.ndarray, n_items: int, *key: int) -> TaskPlaces:
    """Where these rows of endless shuffled epochs over n items stand."""
    epochs, places = np.divmod(rows, n_items)
    row_ids = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        row_ids[here] = Permutation(n_items, (*key, int(epoch)))(places[here])
    return TaskPlaces(epochs, row_ids)


class MixedTaskStream(TaskStream):
    """Several tasks' items, one task after the other in `items`, mixed by `shares`.

    Which task a row comes from is arithmetic (`nanolm.data.mixture`); each task's items come in
    shuffled epochs of its own. `sizes` are the numbers of items of the tasks.
    """

    def __init__(
        self,
        items: list[Any],
        sizes: Sequence[int],
        shares: Sequence[float],
        *,
        seed: int,
        name: str,
    ) -> None:
        super().__init__(items, seed=seed, name=name)
        self.sizes, self.mixture = sizes, Mixture(shares)
        self.firsts = np.cumsum([0, *sizes[:-1]])

    def places(self, start: int, stop: int) -> TaskPlaces:
        """Where training rows [start, stop) stand."""
        tasks, ranks = self.mixture.locate(np.arange(start, stop, dtype=np.int64))
        epochs, row_ids = np.empty_like(ranks), np.empty_like(ranks)
        for task in np.unique(tasks):
            here = tasks == task
            found = shuffled(ranks[here], self.sizes[task], self.seed, int(task))
            epochs[here], row_ids[here] = found.epoch, found.row_id + self.firsts[task]
        return TaskPlaces(epochs, row_ids)
