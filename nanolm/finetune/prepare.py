"""What a fine-tuning run is made of: checkpoint, tokenizer, task, splits, heads and their weights.

    config -> base checkpoint, tokenizer -> tables -> labels -> task -> items    `prepare`
    learner <- weights of the base, adapter                                      `start_weights`

Everything that can be wrong with data or config is found here, before the run's folder is made and
before anything is trained; `finetune.py` runs what was built.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from typing import Any, cast

from nanolm import build
from nanolm.checkpoint.checkpoints import load_trunk, locate
from nanolm.checkpoint.container import read_tensors
from nanolm.config import strict_yaml
from nanolm.data.tables.files import Table
from nanolm.data.tables.stream import TaskStream
from nanolm.data.tokenizer import Tokenizer
from nanolm.data.tokenizer_warning import load_with_warning
from nanolm.distributed.world import World
from nanolm.errors import UserError, require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.evaluation import TaskEvaluator, drawn
from nanolm.finetune.label_order import (
    Labels,
    check_labels,
    labels_by_head,
    objective_of,
    with_known_order,
)
from nanolm.finetune.several import MixedSplit, MultiEvaluator, joined, mixed, resolve_parts
from nanolm.finetune.splits import (
    Split,
    make_split,
    require_fields,
    training_split,
    training_tables,
)
from nanolm.finetune.tasks.base import Task, task_in
from nanolm.finetune.tasks.multi import Multi
from nanolm.learner import Learner
from nanolm.peft.files import begin_adapter, require_whole
from nanolm.registry import OBJECTIVES
from nanolm.training.flops import largest_products, train_flops_per_token
from nanolm.training.throughput import Throughput, peak_flops


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is checked and ready to be launched; `config` is resolved.

    `facts` are hashes of what is trained on and of the tokenizer, which a resumed run must match.
    """

    config: TaskConfig
    base: pathlib.Path
    tokenizer: Tokenizer
    task: Task
    train: Split
    val: Split
    facts: dict[str, str]


def prepare(config: TaskConfig) -> Prepared:
    """Reads and checks everything that a run needs; raises UserError for what the user can mend."""
    base = base_folder(config)
    config = reading(config)
    tokenizer = load_with_warning(base)
    makers = {"train": training_split, "val": make_split}
    task: Task
    train: Split
    val: Split
    if issubclass(task_of(config), Multi):
        config, found = resolve_parts(config, functools.partial(read_tables, tokenizer=tokenizer))
        task = multi = cast(Multi, build.build_objective(config, tokenizer))
        tables = [table for pair in found.values() for table in pair]
        train, val = (
            joined(
                name,
                {
                    part: make(name, pair[place], multi.parts[part], multi.configs[part].data)
                    for part, pair in found.items()
                },
            )
            for place, (name, make) in enumerate(makers.items())
        )
    else:
        known = labels_by_head(objective_of(base))
        config, tables = read_tables(config, tokenizer, known.get(config.objective.name))
        task = single = cast(Task, build.build_objective(config, tokenizer))
        train, val = (
            make(name, table, single, config.data)
            for (name, make), table in zip(makers.items(), tables)
        )
    check_metric(config, task, val)
    task.check_model(config.model)
    config = count_steps(config, len(train.items))
    facts = {"data_hash": digest(tables), "tokenizer_hash": tokenizer.hash}
    return Prepared(config, base, tokenizer, task, train, val, facts)


def reading(config: TaskConfig) -> TaskConfig:
    """The config with the encoder alone as trunk, where the base is an encoder-decoder and the task
    writes nothing: what reads a text is all that it needs."""
    task, model = task_of(config), config.model
    writes = model.trunk in task.trunks
    if model.trunk != "encoder_decoder" or writes or not task.reads_source:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, trunk="encoder"))


def read_tables(
    config: TaskConfig, tokenizer: Tokenizer, known: Labels | None = None
) -> tuple[TaskConfig, list[Table]]:
    """(config with all that one task's data decide filled in, its train and val tables); `known`
    are the labels that the checkpoint's head was trained for."""
    task_class = task_of(config)
    *tables, whole = training_tables(config, task_class)
    return resolve(config, task_class, tokenizer, whole, known), tables


def base_folder(config: TaskConfig) -> pathlib.Path:
    """The checkpoint that is fine-tuned; raises UserError when none is named."""
    if config.init_from is None:
        raise UserError(
            "nothing to fine-tune: set init_from to a run or checkpoint that nanolm wrote (with "
            "--weights random for its shape and tokenizer only)"
        )
    require(
        config.init_layers is None,
        "init_layers is for pretraining, since a task's model has the shape of its base; leave it "
        "out, or make a smaller model first: nanolm train --init_layers",
    )
    base = locate(config.init_from, best=True)
    require_whole(base, config.init_from)
    return base


def task_of(config: TaskConfig) -> type[Task]:
    """The task's class; raises UserError for an objective of pretraining."""
    found = OBJECTIVES.get(config.objective.name).build
    tasks = [name for name in OBJECTIVES.names() if is_task(OBJECTIVES.get(name).build)]
    require(
        is_task(found),
        f"objective={config.objective.name} reads prepared corpora: continue pretraining with "
        f"`nanolm train --init_from`; tasks are {', '.join(tasks)}",
    )
    return found


def is_task(build_objective: Any) -> bool:
    """Whether a registered objective is a task."""
    return isinstance(build_objective, type) and issubclass(build_objective, Task)


def resolve(
    config: TaskConfig,
    task: type[Task],
    tokenizer: Tokenizer,
    train: Table,
    known: Labels | None = None,
) -> TaskConfig:
    """The config with all that data and tokenizer decide filled in: labels, metric, sizes."""
    config = build.resolve(config, tokenizer)
    require_fields(train, task.gold_fields(config.objective))
    options = with_known_order(task, config.objective, train, known)
    metric = config.eval.metric or task.metric_of(options)
    return dataclasses.replace(
        config, objective=options, eval=dataclasses.replace(config.eval, metric=metric)
    )


def check_metric(config: TaskConfig, task: Task, val: Split) -> None:
    """Raises UserError for a figure to choose by that evaluating `val`, or as much of it as
    training looks at, will not give."""
    metric = config.eval.metric
    known = [name for name, _ in task.metrics(task.options)]
    require(
        metric in known,
        f"eval.metric={metric} is no figure of this task; there are {', '.join(known)}",
    )
    names = [name for name in known if "/" not in name] if isinstance(val, MixedSplit) else []
    for prefix, part, split in parts_in(task, val):
        seen = watched(config, split)
        offered = [f"{prefix}{name}" for name in part.offered(seen.table)]
        few = len(seen.table) < len(split.table)
        some = f"the {len(seen.table):,} records that eval.batches takes of " if few else ""
        require(
            metric in offered
            or metric not in [f"{prefix}{n}" for n, _ in part.metrics(part.options)],
            f"eval.metric={metric} cannot be counted on {some}{split.table.path} while it is "
            f"trained; choose by one of {', '.join([*names, *offered])}"
            f"{', or look at more records (--eval.batches null: at all)' if few else ''}",
        )


def parts_in(task: Task, val: Split) -> list[tuple[str, Task, Split]]:
    """(what its figures' names begin with, task, split) of each task of a run."""
    if not isinstance(val, MixedSplit):
        return [("", task, val)]
    return [(f"{name}/", cast(Multi, task).parts[name], part) for name, part in val.parts.items()]


def watched(config: TaskConfig, split: Split) -> Split:
    """As much of a split as each evaluation in training looks at."""
    _, limit = evaluation_size(config)
    return drawn(split, limit) if limit else split


def evaluation_size(config: TaskConfig) -> tuple[int, int | None]:
    """(rows of an evaluation's batch, no larger than a training micro-batch; the most of all)."""
    batch = config.eval.batch or config.train.micro_batch or config.train.global_batch
    return batch, config.eval.batches and config.eval.batches * batch


def check_scope(config: TaskConfig, task: Task, world: World) -> None:
    """A loss that couples the rows of a step needs them all in one forward pass of each rank."""
    train = config.train
    share = -(-train.global_batch // world.size)
    whole = train.micro_batch is None or train.micro_batch >= share
    require(
        task.scope == "rows" or (whole and train.global_batch >= world.size),
        f"objective={config.objective.name} compares all rows of a step: train.micro_batch must be "
        f"null and train.global_batch at least the number of ranks",
    )


def count_steps(config: TaskConfig, n_items: int) -> TaskConfig:
    """The config with steps, evaluations and checkpoints counted from epochs."""
    per_epoch = n_items / config.train.global_batch
    steps_ = config.train.steps
    if steps_ is None:
        steps_ = max(1, round(config.train.epochs * per_epoch))
    every = config.eval.every
    every = max(1, round(per_epoch)) if every is None else every
    saves = config.run.checkpoint_every
    saves = every if saves is None else saves
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps_),
        eval=dataclasses.replace(config.eval, every=every),
        run=dataclasses.replace(config.run, checkpoint_every=saves),
    )


def digest(tables: list[Table]) -> str:
    """One hash of what is trained on and chosen by."""
    text = "\n".join(table.digest() for table in tables)
    return hashlib.sha256(text.encode()).hexdigest()


def start_weights(
    config: TaskConfig, base: pathlib.Path, learner: Learner, checkpoint: pathlib.Path | None
) -> list[str]:
    """Fills trunk and matching heads from the base, and puts the adapter of config.peft on them;
    says what is fresh and what was left unused.

    A run that goes on from a checkpoint finds all weights there, unless it trains an adapter.
    """
    adapted = config.peft.name != "none"
    if checkpoint is not None and not adapted:
        return []
    if config.weights == "random":
        require(not adapted, f"peft={config.peft.name} adapts trained weights, not random ones")
        return [f"random weights in the shape of {base}"]
    fresh = load_trunk(base, learner)
    saved = {key.split(".")[1] for key in read_tensors(base, "model") if key.startswith("heads.")}
    unused = sorted(saved - set(learner.heads))
    task_in(learner).require_heads(fresh, str(base))
    strange = check_labels(config, base, [name for name in learner.heads if name not in fresh])
    part = "" if base_trunk(base) == config.model.trunk else f" (its {config.model.trunk})"
    told = [f"weights from {base}{part}"]
    if fresh:
        told.append(f"fresh heads: {', '.join(f'heads.{name}' for name in fresh)}")
    if unused:
        told.append(f"unused of the checkpoint: {', '.join(f'heads.{name}' for name in unused)}")
    notes = ["; ".join(told), *strange]
    if adapted:
        notes.append(begin_adapter(config, learner, fresh, base, checkpoint))
    return notes


def base_trunk(base: pathlib.Path) -> str:
    """The trunk of a checkpoint."""
    return strict_yaml.read_mapping(base / "config.yaml")["model"]["trunk"]


def describe(train: Split, val: Split, learner: Learner) -> list[str]:
    """What is trained on what, in lines for the log."""
    total = sum(p.numel() for p in learner.parameters())
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    where = f"from {val.table.path}"
    if train.table.path == val.table.path:
        seen = not set(train.table.numbers).isdisjoint(val.table.numbers)
        where = "is the same file, so its records are trained on" if seen else "is a part of it"
    return [
        f"train is read from {train.table.path}, val {where}",
        *train.messages,
        *val.messages,
        f"train {len(train.table):,} records ({len(train.items):,} rows, "
        f"{train.mean_tokens:.1f} tokens each), val {len(val.table):,}; {trained:,} of {total:,} "
        f"parameters are trained",
    ]


def open_stream(config: TaskConfig, task: Task, train: Split) -> TaskStream:
    """The rows of training; of several tasks, mixed."""
    if isinstance(train, MixedSplit):
        return mixed(cast(Multi, task), train, config.run.seed)
    return TaskStream(train.items, seed=config.run.seed, name=train.table.path)


def build_evaluator(
    config: TaskConfig, split: Split, world: World
) -> TaskEvaluator | MultiEvaluator:
    """The evaluator of a split, in pieces no larger than a training micro-batch."""
    if isinstance(split, MixedSplit):
        parts = split.parts.items()
        return MultiEvaluator({name: build_evaluator(config, part, world) for name, part in parts})
    batch, limit = evaluation_size(config)
    return TaskEvaluator(split, world, batch=batch, limit=limit, seed=config.run.seed)


def tokens_per_step(config: TaskConfig, train: Split) -> int:
    """Real tokens of an optimizer step, on average: padding is no throughput."""
    return max(1, round(train.mean_tokens * config.train.global_batch))


def build_throughput(config: TaskConfig, task: Task, train: Split, world: World) -> Throughput:
    """The clock, counting real tokens; its model FLOPs leave the head out, but for an
    encoder-decoder's, which is reckoned with what it writes."""
    tokens = tokens_per_step(config, train)
    length, share = max(1, round(train.mean_tokens)), task.targets_per_token(train.items)
    flops = train_flops_per_token(config.model, length, predicted_share=share)
    products = largest_products(config.model, tokens)
    peak, _ = peak_flops(world.device, config.train.precision, products)
    return Throughput(tokens, flops * tokens, peak and peak * world.size)
