"""Evaluation of a task: every record once over the ranks, answers gathered, metrics of the whole.

A figure such as F1 is no mean of batches, so the ranks exchange answers, not sums; the loss terms
are summed as in pretraining. In fine-tuning's loop this takes the place of `evaluation.Evaluator`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanolm.data.permutation import Permutation
from nanolm.data.tables.splits import pick
from nanolm.data.tables.stream import TaskStream
from nanolm.distributed.world import World
from nanolm.finetune.splits import Split
from nanolm.finetune.tasks.base import Task, task_in
from nanolm.finetune.tasks.items import Item
from nanolm.finetune.tasks.metrics import Report
from nanolm.model.trunk import Inputs
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine
from nanolm.training.evaluation import Sums, in_step
from nanolm.training.evaluation import figures as means_of
from nanolm.training.loader import eval_batches

Prediction = dict[str, Any]


class TaskEvaluator:
    """Evaluates a learner on one split; `report` and `predictions` keep the last result."""

    def __init__(
        self, split: Split, world: World, *, batch: int, limit: int | None = None, seed: int = 0
    ) -> None:
        self.split = drawn(split, limit) if limit else split
        self.world, self.batch, self.table = world, batch, self.split.table
        self.stream = TaskStream(self.split.items, seed=seed, name=split.table.path)
        self.report: Report | None = None
        self.predictions: list[Prediction] = []

    def __call__(
        self, engine: Engine, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The figures, on every rank; None when `stop` said so on any of them. Collective."""
        mine = evaluated(engine, self._batches(engine), stop)
        parts = self.world.gather(mine)
        if any(part["stopped"] for part in parts):
            return None
        sums = Sums()
        for part in parts:
            for name, (value, count) in part["sums"].items():
                sums.add(name, value, count)
        task = task_in(engine.learner)
        found = means_of(sums, task.weights)
        if task.generates:
            return found
        answers = [answer for part in parts for answer in part["answers"]]
        self.predictions = task.predictions(self.table, self.stream.items, answers)
        self.report = task.report(self.table, self.predictions)
        return found | self.report.figures

    def _batches(self, engine: Engine) -> Iterator[MicroBatch]:
        task = task_in(engine.learner)
        return eval_batches(self.stream, task, self.batch, self.world.rank, self.world.size)


def drawn(split: Split, limit: int) -> Split:
    """A keyed sample of whole records, as many as have at most `limit` items and at least one: a
    file may be sorted, and figures of half a record mean nothing. The same for every run."""
    items_of: dict[int, list[Item]] = {}
    for item in split.items:
        items_of.setdefault(item.record, []).append(item)
    order = Permutation(len(split.table), (limit,))
    chosen: list[int] = []
    n_items = 0
    for place in range(len(split.table)):
        record = int(order(np.array([place]))[0])
        n_items += len(items_of[record])
        if chosen and n_items > limit:
            break
        chosen.append(record)
    chosen.sort()
    items = [
        dataclasses.replace(item, record=number)
        for number, record in enumerate(chosen)
        for item in items_of[record]
    ]
    return dataclasses.replace(split, table=pick(split.table, chosen), items=items)


def evaluated(
    engine: Engine, batches: Iterator[MicroBatch], stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """{answers, sums, stopped} of this rank's batches, in order; without gold there are no sums."""
    learner, task = engine.learner, task_in(engine.learner)
    answers: list[Any] = []
    sums = Sums()
    was_training = learner.training
    learner.eval()
    try:
        with torch.no_grad():
            for batch in in_step(engine, batches):
                if stop() and not engine.sharded:
                    return {"answers": [], "sums": {}, "stopped": True}
                terms, found = engine.local(batch, Answering(task))
                if not len(batch.row_ids):
                    continue
                answers += found
                sums.add_terms(terms)
    finally:
        learner.train(was_training)
    return {"answers": answers, "sums": sums, "stopped": False}


class Answering:
    """A task whose loss brings the answers along, both from one forward pass of the learner."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """What the trunk reads."""
        return self.task.inputs(batch)

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> tuple[dict[str, Any], list[Any]]:
        """(loss terms, none without gold; one answer per item)."""
        terms = self.task.loss(hidden_BTD, heads, batch) if self.task.has_gold(batch) else {}
        return terms, self.task.answers(hidden_BTD, heads, batch)


def predict(engine: Engine, split: Split, batch: int) -> list[Prediction]:
    """One prediction per record of a split, without looking at gold labels."""
    task = task_in(engine.learner)
    items: list[Item] = split.items
    stream = TaskStream(items, seed=0, name=split.table.path)
    found = evaluated(engine, eval_batches(stream, task, batch))
    return task.predictions(split.table, items, found["answers"])
