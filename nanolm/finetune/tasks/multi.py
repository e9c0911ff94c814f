"""Several tasks in one run: a shared trunk, each task with its own head, loss and data.

    L = sum over tasks i and their terms t of  w_i * sum_t / C_t

Each term is divided by its own count of targets, so `weight` says how much a task's mean loss
matters and `share` how many of a step's examples are its own: the second is no hidden weight. (In
the line of Caruana 1997; Liu et al. 2019a, MT-DNN, who take whole batches of one task in turn. Here
a batch mixes the tasks, so that every step moves the trunk for all of them.)

This is a composition: `parts` are the objectives that would train alone. The sequences of all of
them lie in one batch, the trunk runs once, and each part reads its own sequences' states under its
own names (`NAME/index`, `NAME/labels`, … in the batch; `NAME/term` among the terms).

Shapes: B rows, T tokens of a row, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from nanolm.config.load import load_config
from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.config.typed import instance
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError, require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.tasks.base import Task, TaskOptions
from nanolm.finetune.tasks.items import Item
from nanolm.finetune.tasks.metrics import Metric, higher, lower
from nanolm.model.heads import HeadRequest
from nanolm.objectives.base import Term
from nanolm.registry import OBJECTIVES, Options

SHARED_HEAD = "lm"
"""The vocabulary head comes from the base: all parts that read it share it."""
PART_KEYS = ("objective", "data", "share", "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiOptions(TaskOptions):
    """Several tasks on one trunk."""

    name: str = "multi"
    tasks: dict[str, dict[str, Any] | None] = dataclasses.field(default_factory=dict)
    """Each task under a name of its own: {objective: …, data: …, share: …, weight: …}. data adds
    to the run's; share (null: by the number of examples) is its part of the examples, weight (1)
    that of its loss. null in place of a task takes that of a config file back."""

    @property
    def given(self) -> dict[str, dict[str, Any]]:
        """The tasks, without those that were taken back."""
        return {name: mapping for name, mapping in self.tasks.items() if mapping is not None}

    def __post_init__(self) -> None:
        named = self.given
        object.__setattr__(self, "tasks", named)
        for name, mapping in named.items():
            where = f"objective.tasks.{name}"
            require(name.isidentifier(), f"{where}: a task's name is letters, digits and _ only")
            unknown = sorted(set(mapping) - set(PART_KEYS))
            require(
                not unknown,
                f"{where}.{', '.join(unknown)}: there is no such key; there are "
                f"{', '.join(PART_KEYS)}",
            )
            require("objective" in mapping, f"{where} has no objective: say which task it is")
            for key in ("share", "weight"):
                value = mapping.get(key)
                good = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
                require(value is None or good, f"{where}.{key}={value!r} must be a positive number")
        without = [name for name, mapping in named.items() if mapping.get("share") is None]
        shared = [name for name in named if name not in without]
        require(
            not (without and shared),
            f"objective.tasks: {', '.join(shared)} has a share and {', '.join(without)} has none; "
            f"give every task one, or none of them; a task of a config file is taken back with "
            f"--objective.tasks '{{{', '.join(f'{name}: null' for name in shared)}}}'",
        )


def parts_of(options: MultiOptions) -> dict[str, tuple[type[Task], Options]]:
    """{task: its class and its options, as far as they are known}."""
    found = {}
    for name, mapping in options.given.items():
        given = mapping["objective"]
        given = {"name": given} if isinstance(given, str) else given
        entry = OBJECTIVES.get(given["name"])
        found[name] = (entry.build, instance(entry.options, given, f"objective.tasks.{name}"))
    return found


def _all_higher(options: MultiOptions) -> bool:
    return all(
        dict(part.metrics(own))[part.metric_of(own)] for part, own in parts_of(options).values()
    )


def part_configs(config: TaskConfig) -> dict[str, TaskConfig]:
    """{task: the config of a run that trained it alone}; raises UserError naming the task's key."""
    tasks = cast(MultiOptions, config.objective).given
    require(
        len(tasks) >= 2,
        "objective=multi needs at least two tasks: objective.tasks={NAME: {objective: …}, …}",
    )
    return {name: _part_config(config, name, mapping) for name, mapping in tasks.items()}


def _part_config(config: TaskConfig, name: str, mapping: dict[str, Any]) -> TaskConfig:
    data = dataclasses.asdict(config.data) | (mapping.get("data") or {})
    try:
        base = {"objective": mapping["objective"], "data": data}
        own: TaskConfig = load_config([], schema=TaskConfig, base=base, prog="nanolm finetune")
    except UserError as error:
        raise UserError(f"objective.tasks.{name}: {error}") from None
    require(
        own.objective.name != "multi",
        f"objective.tasks.{name}: several tasks cannot be one of several; name its tasks here",
    )
    require(
        own.data.pack == config.data.pack,
        f"objective.tasks.{name}.data.pack: all tasks lie in one batch; set data.pack for the run",
    )
    evaluation = dataclasses.replace(config.eval, metric=None)
    return dataclasses.replace(config, objective=own.objective, data=own.data, eval=evaluation)


@dataclasses.dataclass(slots=True)
class PartItem(Item):
    """An item and the task that it belongs to."""

    part: str = ""


@OBJECTIVES.register("multi", options=MultiOptions)
class Multi(Task):
    """What several tasks ask, at once."""

    options: MultiOptions
    fields = ()
    gold = ()
    metric = "score"
    """The mean of the tasks' own metrics."""

    def __init__(self, options: MultiOptions, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(options, config, tokenizer)
        self.configs = part_configs(cast(TaskConfig, config))
        self.parts: dict[str, Task] = {}
        self.weights, self.heads = {}, {}
        self.stand_ins: dict[str, PartItem] = {}
        for name, own in self.configs.items():
            build = OBJECTIVES.get(own.objective.name).build
            require(
                self.trunk in build.trunks,
                f"objective.tasks.{name}: objective={own.objective.name} trains "
                f"{' or '.join(build.trunks)} trunks, but the base's is {self.trunk}; take the "
                f"task out, or another base",
            )
            part = build(own.objective, own, tokenizer)
            self._add(name, part, options.given[name].get("weight") or 1.0)

    @classmethod
    def metrics(cls, options: MultiOptions) -> tuple[Metric, ...]:
        """The loss, every task's figures as NAME/figure, and `score`, their own metrics' mean."""
        parts = [
            Metric(f"{name}/{figure}", is_higher)
            for name, (part, own) in parts_of(options).items()
            for figure, is_higher in part.metrics(own)
        ]
        return (*lower("loss"), *parts, *(higher(cls.metric) if _all_higher(options) else ()))

    @classmethod
    def metric_of(cls, options: MultiOptions) -> str:
        """`score`; the loss where a task's own metric is the better the lower it is, since a mean
        of such figures says nothing."""
        return cls.metric if _all_higher(options) else "loss"

    def _add(self, name: str, part: Task, weight: float) -> None:
        where = f"objective.tasks.{name}"
        self.movable &= part.movable
        if part.scope == "global_batch":
            self.scope = part.scope
        for head, request in part.heads.items():
            key = head_key(name, head)
            require(
                self.heads.get(key, request) == request,
                f"{where} wants another vocabulary head than the other tasks",
            )
            self.heads[key] = HeadRequest(*request)
        self.parts[name] = part
        self.weights |= {f"{name}/{term}": weight * w for term, w in part.weights.items()}

    def check_model(self, model: ModelConfig) -> None:
        """As each part says."""
        for name, part in self.parts.items():
            try:
                part.check_model(model)
            except UserError as error:
                raise UserError(f"objective.tasks.{name}: {error}") from None

    def stand_in(self, items: list[PartItem]) -> None:
        """Takes the first item of each task: it stands in for its task, counting for nothing, in a
        micro-batch without any. So every head has a gradient and every rank the same terms."""
        for item in items:
            self.stand_ins.setdefault(item.part, item)

    def require_heads(self, fresh: list[str], base: str) -> None:
        """As each part says."""
        for name, part in self.parts.items():
            part.require_heads([head for head in part.heads if head_key(name, head) in fresh], base)

    def collate(self, examples: list[Any]) -> dict[str, np.ndarray]:
        """All sequences in one batch, and under each task's name what it reads of them."""
        present = {item.part for item in examples}
        absent = [item for name, item in self.stand_ins.items() if name not in present]
        examples = [*examples, *absent]
        sequences = [sequence for item in examples for sequence in item.sequences]
        owners = [item.part for item in examples for _ in item.sequences]
        batch, index_M = self.rows(sequences)
        ends = np.cumsum([len(sequence.tokens) for sequence in sequences])
        spans = np.split(index_M, ends[:-1])
        found = dict(batch)
        for name, part in self.parts.items():
            mine = [span for span, owner in zip(spans, owners, strict=True) if owner == name]
            if not mine:
                continue
            own = self.places(mine)
            own |= part.targets_of([i for i in examples if i.part == name], batch | own)
            if name not in present:
                own["stand_in"] = np.ones(1, dtype=np.int64)
            found |= {f"{name}/{key}": values for key, values in own.items()}
        return found

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """Targets of each task's terms."""
        return {
            f"{name}/{term}": 0 if "stand_in" in own else count
            for name, part, own in self._views(batch)
            for term, count in part.counts(own).items()
        }

    def _views(self, batch: dict[str, Any]) -> Iterator[tuple[str, Task, dict[str, Any]]]:
        """(name, objective, its part of the batch) of each task that the batch has."""
        for name, part in self.parts.items():
            prefix = f"{name}/"
            own = {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
            if own:
                yield name, part, own

    def has_gold(self, batch: dict[str, Tensor]) -> bool:
        """Whether every task has what its loss compares with."""
        return all(part.has_gold(own) for _, part, own in self._views(batch))

    def loss(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Term]:
        """All tasks' terms."""
        terms: dict[str, Term] = {}
        for name, part, own in self._views(batch):
            found = part.loss(hidden_BTD, own_heads(name, part, heads), own)
            share = 0 if "stand_in" in own else 1
            terms |= {
                f"{name}/{key}": Term(term.sum * share, term.count * share)
                for key, term in found.items()
            }
        return terms

    def logits(
        self, hidden_BTD: Tensor, heads: nn.ModuleDict, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The logits of the tasks that have some, for rules that compare distributions."""
        found = {}
        for name, part, own in self._views(batch):
            if not hasattr(part, "logits"):
                continue
            for key, logits_NC in part.logits(
                hidden_BTD, own_heads(name, part, heads), own
            ).items():
                found[f"{name}/{key}"] = logits_NC[:0] if "stand_in" in own else logits_NC
        return found


def head_key(part: str, head: str) -> str:
    """The name under which a task's head is saved."""
    return head if head == SHARED_HEAD else f"{part}_{head}"


def own_heads(name: str, part: Task, heads: nn.ModuleDict) -> nn.ModuleDict:
    """A task's heads under the names that it knows."""
    return nn.ModuleDict({head: heads[head_key(name, head)] for head in part.heads})
