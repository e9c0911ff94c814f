"""A run of several tasks: its data, its evaluation, and one task taken out of what was saved.

    config -> a config per task -> labels of each                        `resolve_parts`
    items of all, mixed by share -> one stream                           `mixed`
    each task's own evaluator on its own records                         `MultiEvaluator`
    saved run -> a saved run of one task                                 `part_of`

A task taken out is what it would be had it been trained alone: evaluate, predict and explain know
nothing of the others.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

from nanolm.data.tables.files import Table
from nanolm.data.tables.stream import MixedTaskStream
from nanolm.errors import UserError, require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.splits import Split
from nanolm.finetune.tasks.base import as_objective, task_in
from nanolm.finetune.tasks.items import Item
from nanolm.finetune.tasks.metrics import Report
from nanolm.finetune.tasks.multi import (
    Multi,
    MultiOptions,
    PartItem,
    own_heads,
    part_configs,
)
from nanolm.learner import Learner
from nanolm.saved import Saved
from nanolm.training.engine import Engine
from nanolm.training.evaluation import Evaluate
from nanolm.training.gradient import total_loss


@dataclasses.dataclass(frozen=True)
class MixedSplit(Split):
    """The records of all tasks, and each task's own split."""

    parts: dict[str, Split]


def resolve_parts(
    config: TaskConfig, resolve: Callable[[TaskConfig], tuple[TaskConfig, Any]]
) -> tuple[TaskConfig, dict[str, Any]]:
    """(config with every task's options filled in, what `resolve` found beside each).

    `resolve` fills in what one task's data decide. Raises UserError naming the task.
    """
    given = cast(MultiOptions, config.objective)
    tasks: dict[str, dict[str, Any] | None] = {}
    found = {}
    for name, own in part_configs(config).items():
        try:
            own, found[name] = resolve(own)
        except UserError as error:
            raise UserError(f"objective.tasks.{name}: {error}") from None
        tasks[name] = given.given[name] | {
            "objective": dataclasses.asdict(own.objective),
            "data": dataclasses.asdict(own.data),
        }
        config = dataclasses.replace(config, model=own.model)
    objective = dataclasses.replace(given, tasks=tasks)
    metric = config.eval.metric or Multi.metric_of(objective)
    evaluation = dataclasses.replace(config.eval, metric=metric)
    return dataclasses.replace(config, objective=objective, eval=evaluation), found


def joined(name: str, parts: dict[str, Split]) -> MixedSplit:
    """One split of all tasks' splits."""
    items: list[Item] = [
        PartItem(item.record, item.sequences, item.target, item.cut, item.extra, part=part)
        for part, split in parts.items()
        for item in split.items
    ]
    tables = [split.table for split in parts.values()]
    table = Table(
        " + ".join(table.path for table in tables),
        [record for table in tables for record in table.records],
        [number for table in tables for number in table.numbers],
    )
    messages = [f"{part}: {note}" for part, split in parts.items() for note in split.messages]
    return MixedSplit(name, table, items, messages, parts)


def mixed(task: Multi, split: MixedSplit, seed: int) -> MixedTaskStream:
    """The tasks' items, interleaved by their shares."""
    task.stand_in(cast(list[PartItem], split.items))
    sizes = [len(part.items) for part in split.parts.values()]
    given = [task.options.given[name].get("share") for name in split.parts]
    shares = [own or size for own, size in zip(given, sizes, strict=True)]
    return MixedTaskStream(split.items, sizes, shares, seed=seed, name=split.table.path)


class MultiEvaluator:
    """Evaluates each task on its own split; figures are called NAME/figure, and `score` is the mean
    of the tasks' own metrics where it means something (`Multi.metric_of`)."""

    def __init__(self, parts: Mapping[str, Evaluate]) -> None:
        self.parts = dict(parts)
        self.report: Report | None = None

    def __call__(
        self, engine: Engine, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The figures, on every rank; None when `stop` said so on any of them. Collective."""
        multi = multi_in(engine.learner)
        found: dict[str, float] = {}
        for name, evaluator in self.parts.items():
            figures = evaluator(engine_of(engine, name), stop)
            if figures is None:
                return None
            found |= {f"{name}/{key}": value for key, value in figures.items()}
        own = {name: part.metric_of(part.options) for name, part in multi.parts.items()}
        means = {term: found[term] for term in multi.weights if term in found}
        found = {"loss": total_loss(means, multi.weights)} | found
        if multi.metric_of(multi.options) == multi.metric:
            found[multi.metric] = sum(found[f"{n}/{metric}"] for n, metric in own.items()) / len(
                own
            )
        return found


def multi_in(learner: Learner) -> Multi:
    """The composition of tasks that a learner of several holds."""
    return cast(Multi, learner.objective)


def learner_of(learner: Learner, name: str) -> Learner:
    """A learner of one task: the same trunk and weights, under the names of a run of its own."""
    part = multi_in(learner).parts[name]
    own = Learner(learner.trunk, own_heads(name, part, learner.heads), as_objective(part))
    own.adapter = learner.adapter
    return own.train(learner.training)


def engine_of(engine: Engine, name: str) -> Engine:
    """The engine as the evaluation of one task sees it."""
    view = copy.copy(engine)
    view.learner = learner_of(engine.learner, name)
    return view


def part_of(saved: Saved, name: str | None) -> Saved:
    """The saved run of one task; raises UserError when the run has several and none is named, or
    has no such task."""
    task = task_in(saved.learner)
    if not isinstance(task, Multi):
        require(name is None, f"{saved.folder} is a run of one task: leave --task out")
        return saved
    if name is None or name not in task.parts:
        raise UserError(
            f"{saved.folder} has several tasks: say which one with --task "
            f"{' or --task '.join(task.parts)}"
        )
    learner, own = learner_of(saved.learner, name), task.configs[name]
    return dataclasses.replace(saved, config=own, learner=learner, part=name, whole=saved.config)
