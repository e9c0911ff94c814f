"""The loader: rows of the stream become torch batches, the last step before the model.

    schedule (step -> rows of this rank) -> stream.rows -> objective.example -> objective.collate
    -> MicroBatch (int64 tensors, target counts, row ids) -> device

The order is arithmetic and all randomness is keyed by (seed, epoch, row id), so the loader's whole
state is one integer, the next step, and a batch is the same bytes whatever the number of workers,
ranks or restarts.

What an objective brings: `example(row, rng, draw)` for one row, `collate(examples)` without
randomness, `counts(batch)`, the number of targets of each loss term. An objective that does nothing
to single rows may also have `batch(block: RowBlock) -> dict of arrays`, which then stands for
example and collate together: no generator and no object is made for a row. Where `batch` is missing
or None, they are used.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nanolm.config.schema import Config
from nanolm.data.permutation import Permutation
from nanolm.data.schedule import cut, shard_rows, share_of
from nanolm.data.stream import RowStream
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.objectives.base import Draw
from nanolm.training.batch import MicroBatch

PREFETCH = 4
"""Micro-batches that each worker process prepares ahead."""


class Stream(Protocol):
    """What the loader asks of a stream of rows: `RowStream` reads tokens, `TaskStream` items.

    Places and rows are the stream's own types: it alone, and the objective, look into them.
    """

    @property
    def seed(self) -> int:
        """Keys every random choice."""

    @property
    def remote(self) -> bool:
        """Whether it reads from an object store."""

    @property
    def read_ahead(self) -> int:
        """Micro-batches that it wants to hear of before they are read."""

    def __len__(self) -> int:
        """Rows of one pass."""

    def places(self, start: int, stop: int) -> Any:
        """Where rows [start, stop) of training stand."""

    def places_of(self, row_ids: np.ndarray) -> Any:
        """Where the rows with these ids stand."""

    def expect(self, start: int, stop: int) -> None:
        """Told that rows [start, stop) of training will be read soon."""

    def read(self, places: Any) -> list[Any]:
        """The rows that stand there."""

    def draw(self, row: Any, k: int) -> Any:
        """The k-th keyed other row."""


class RowObjective(Protocol):
    """The data side of an objective, all that the loader knows of it."""

    def example(self, row: Any, rng: np.random.Generator, draw: Draw) -> Any:
        """One row made ready; `draw(k)` gives the k-th keyed other row."""

    def collate(self, examples: list) -> dict[str, np.ndarray]:
        """Examples as one batch; no randomness."""

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Number of targets of each loss term."""


def micro_batch_of(places: Any, stream: Stream, objective: RowObjective, seed: int) -> MicroBatch:
    """Rows -> examples -> batch; each row's generator is default_rng((seed, epoch, row_id))."""
    whole = getattr(objective, "batch", None)
    if whole is not None:
        batch = whole(cast(RowStream, stream).read_block(places))
    else:
        rows = stream.read(places)
        batch = objective.collate([_example(row, stream, objective, seed) for row in rows])
    tensors = {name: _tensor(values) for name, values in batch.items()}
    return MicroBatch(tensors, objective.counts(batch), places.row_id)


def _example(row: Any, stream: Stream, objective: RowObjective, seed: int) -> Any:
    rng = np.random.default_rng((seed, row.epoch, row.row_id))
    return objective.example(row, rng, functools.partial(stream.draw, row))


def _tensor(values: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory; integers of other types become int64."""
    if values.dtype != np.int64 and values.dtype.kind in "iu":
        values = values.astype(np.int64)
    return torch.from_numpy(values)


class Loader:
    """Endless optimizer steps of one rank: iterating yields a list of MicroBatch for each step.

    global_batch: rows of a step over all ranks; micro_batch: rows of one MicroBatch, at most. A
    rank's list is empty when its share of the step is. seed: of the rows' generators, the stream's
    own when None. workers: processes that prepare batches ahead (0: in this process). `step` is the
    next step to be delivered and all the state there is. Raises ValueError for pin=True on the CPU.
    """

    def __init__(
        self,
        stream: Stream,
        objective: RowObjective,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int | None = None,
        workers: int = 0,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        pin: bool = False,
    ) -> None:
        if pin and torch.device(device).type == "cpu":
            raise ValueError("pin=True is for copies to an accelerator, and device is the CPU")
        self.stream, self.objective = stream, objective
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world = rank, world
        self.seed = stream.seed if seed is None else seed
        self.workers, self.step = workers, start_step
        self.device, self.pin = torch.device(device), pin
        self._source: Iterator[MicroBatch] | None = None
        self._turn = 0
        self.pieces(start_step)  # refuses a wrong rank or micro-batch now, not in a worker

    def pieces(self, step: int) -> list[range]:
        """Global rows of each micro-batch of this rank in `step`."""
        return shard_rows(step, self.global_batch, self.rank, self.world, self.micro_batch)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        self.close()
        per_step = len(self.pieces(self.step))  # the same in every step
        if not per_step:  # more ranks than rows: this one never has any
            while True:
                self.step += 1
                yield []
        self._source = self._from_workers() if self.workers else map(self.build, self._ahead())
        self._turn += 1
        turn = self._turn
        try:
            while True:
                batches = [self._next(turn) for _ in range(per_step)]
                self.step += 1
                yield batches
        finally:
            if turn == self._turn:  # a later iteration keeps its own workers
                self.close()

    def build(self, rows: range) -> MicroBatch:
        """The micro-batch of these global rows, on the CPU."""
        places = self.stream.places(rows.start, rows.stop)
        return micro_batch_of(places, self.stream, self.objective, self.seed)

    def close(self) -> None:
        """End the worker processes; iterating again starts new ones at `step`."""
        if self._source is not None and self.workers:
            # The traceback of an error may keep torch's iterator until the garbage collector, which
            # closes its queues first; each worker would then be waited for in vain for 5 s.
            cast(Any, self._source)._shutdown_workers()
        self._source = None

    def _next(self, turn: int) -> MicroBatch:
        if self._source is None or turn != self._turn:
            raise RuntimeError("the loader was closed, or iterated again, under this iterator")
        batch = next(self._source)
        if isinstance(batch, _Refusal):
            raise UserError(batch.sentence)
        return batch if self.device.type == "cpu" else batch.to(self.device, self.pin)

    def _ahead(self) -> Iterator[range]:
        """Rows of all micro-batches from the present step on, without end.

        The stream is told of those to come, also for the workers: they share the node's cache.
        """
        coming: collections.deque[range] = collections.deque()
        for rows in self._all_rows():
            if self.stream.read_ahead:
                self.stream.expect(rows.start, rows.stop)
            coming.append(rows)
            if len(coming) > self.stream.read_ahead:
                yield coming.popleft()

    def _all_rows(self) -> Iterator[range]:
        step, pieces = self.step, self.pieces(0)
        while True:
            first = step * self.global_batch
            for piece in pieces:
                yield range(first + piece.start, first + piece.stop)
            step += 1

    def _from_workers(self) -> Iterator[MicroBatch]:
        return iter(
            DataLoader(
                _Builder(self.stream, self.objective, self.seed),
                sampler=self._ahead(),
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self.workers,
                prefetch_factor=PREFETCH,
                worker_init_fn=_leave_the_process_group,
                # A fork shares the opened shards and starts at once; from Python 3.14 on it must be
                # asked for. PyArrow's S3 client does not outlive one.
                multiprocessing_context="forkserver" if self.stream.remote else "fork",
            )
        )


def open_loader(
    config: Config, stream: Stream, objective: RowObjective, world: World, start: int = 0
) -> Loader:
    """This rank's loader, at optimizer step `start`."""
    return Loader(
        stream,
        objective,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch or config.train.global_batch,
        rank=world.rank,
        world=world.size,
        seed=config.run.seed,
        workers=config.data.workers,
        start_step=start,
        device=world.device,
        pin=world.device.type == "cuda",
    )


def steps(
    config: Config, stream: Stream, objective: RowObjective, world: World, start: int
) -> Generator[Sequence[MicroBatch], None, None]:
    """Micro-batches of each optimizer step from `start` on; a rank without rows gets a blank one,
    with the tensors of a real row (see `MicroBatch.blank`)."""
    loader = open_loader(config, stream, objective, world, start)
    try:
        blank: MicroBatch | None = None
        for micro_batches in loader:
            if not micro_batches and blank is None:
                blank = loader.build(range(1)).to(world.device, pin=False).blank()
            yield micro_batches or [cast(MicroBatch, blank)]
    finally:
        loader.close()


@dataclasses.dataclass
class _Refusal:
    """A UserError on its way out of a worker process, which would wrap it in its traceback."""

    sentence: str


class _Builder(Dataset):
    """What a worker process holds: global rows -> MicroBatch."""

    def __init__(self, stream: Stream, objective: RowObjective, seed: int) -> None:
        self.stream, self.objective, self.seed = stream, objective, seed

    def __getitem__(self, rows: range) -> MicroBatch | _Refusal:
        try:
            places = self.stream.places(rows.start, rows.stop)
            return micro_batch_of(places, self.stream, self.objective, self.seed)
        except UserError as error:
            return _Refusal(str(error))


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_the_process_group(worker: int) -> None:
    """Signals to the whole group (Ctrl-C, a scheduler's SIGTERM) are the trainer's to answer: it
    finishes its step and saves, for which it needs its workers. They end with it, and notice by
    themselves within seconds when it is killed."""
    os.setpgrp()


def eval_batches(
    stream: Stream,
    objective: RowObjective,
    batch: int,
    rank: int = 0,
    world: int = 1,
    *,
    seed: int | None = None,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    pin: bool = False,
) -> Iterator[MicroBatch]:
    """Each row of one pass exactly once over the ranks, in batches of at most `batch` rows.

    `stream` should be opened with partial=True. Row i has the generator of epoch 0, so its example
    is the same for every world and batch size. limit: evaluate only so many rows, a keyed sample
    that is also the same for all.
    """
    seed = stream.seed if seed is None else seed
    row_ids = np.arange(len(stream))
    if limit is not None and limit < len(stream):
        row_ids = np.sort(Permutation(len(stream), (seed,))(row_ids[:limit]))
    for piece in cut(share_of(0, len(row_ids), rank, world), batch):
        places = stream.places_of(row_ids[piece.start : piece.stop])
        found = micro_batch_of(places, stream, objective, seed)
        yield found if torch.device(device).type == "cpu" else found.to(device, pin)
