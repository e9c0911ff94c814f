"""Fine-tuning: `torchrun -m nanolm.finetune --config …`, the same as `nanolm finetune`.

`run_finetune` is the table of contents, as `commands/train.py` is for pretraining. The trainer,
loader, checkpoints and resume are the same; what differs is where rows come from (a labelled
table), what reads the hidden states (a task's fresh head) and how a validation figure chooses the
best checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nanolm import build, strict_yaml
from nanolm.arguments import dump, load_config, read_files, split_words
from nanolm.augment import Augmented
from nanolm.checkpoint import Checkpoints, load_trunk, locate, read_trainer
from nanolm.commands.train import open_sinks, steps
from nanolm.container import read_tensors, write_json
from nanolm.data.task_files import Table
from nanolm.data.task_stream import TaskStream
from nanolm.data.tokenizer import MODEL_FILE, Tokenizer
from nanolm.distributed import World, close, launch
from nanolm.errors import UserError, require
from nanolm.flops import train_flops_per_token
from nanolm.learner import Learner
from nanolm.metrics import Throughput, peak_flops
from nanolm.model_card import write_card
from nanolm.objectives.task import Task
from nanolm.peft.files import adapter_files, begin_adapter
from nanolm.registry import OBJECTIVES
from nanolm.runfolder import claim
from nanolm.task_config import TaskConfig
from nanolm.task_data import Split, make_split, require_fields, training_tables
from nanolm.task_evaluation import TaskEvaluator
from nanolm.task_metrics import LOWER_IS_BETTER
from nanolm.trainer import Trainer


def main(argv: list[str]) -> None:
    """Reads the command line and fine-tunes."""
    run_finetune(load_task_config(argv))


def load_task_config(argv: list[str]) -> TaskConfig:
    """The run's config; the group `model` starts from that of the checkpoint in `init_from`."""
    words = split_words(argv)
    named = words.get("init_from") or [read_files(dict(words), {}).get("init_from")]
    base = {"model": base_model(named[0])} if named[0] not in (None, "null") else {}
    return load_config(argv, schema=TaskConfig, prog="nanolm finetune", base=base)


def base_model(path: str) -> dict[str, Any]:
    """The saved `model` group of a run or checkpoint."""
    return strict_yaml.read_mapping(locate(path, best=True) / "config.yaml")["model"]


def run_finetune(config: TaskConfig) -> dict[str, Any]:
    """Fine-tunes as the config says; returns the summary, empty when a signal ended the run.

    Raises UserError for anything the user can mend, before anything is trained.
    """
    started = time.perf_counter()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    base = base_folder(config)
    tokenizer = Tokenizer.load(base / MODEL_FILE)
    task_class = task_of(config)
    *tables, whole = training_tables(config, task_class)
    config = resolve(config, task_class, tokenizer, whole)
    task = build.build_objective(config, tokenizer)
    train, val = (
        make_split(name, table, task, config.data) for name, table in zip(("train", "val"), tables)
    )
    config = count_steps(config, len(train.items))
    world = launch(config.distributed, config.run.device)
    check_scope(config, task, world)
    facts = {"data_hash": digest(tables), "tokenizer_hash": tokenizer.hash}
    start = claim(pathlib.Path(config.run.dir), config.resume, dump(config), facts, world)
    learner = build.build_learner(config, task, world.device)
    told = start_weights(config, base, learner, start.checkpoint)
    done = read_trainer(start.checkpoint)["step"] if start.checkpoint else 0
    sinks, note = open_sinks(config, world, done)
    for line in [*start.notes, *told, *describe(train, val, learner)]:
        note(line)
    stream = TaskStream(train.items, seed=config.run.seed, name=train.table.path)
    noisy = Augmented(task, config.augment, tokenizer) if config.augment.used else task
    evaluator = build_evaluator(config, val, world)
    try:
        trainer = Trainer(
            config,
            learner,
            world,
            functools.partial(steps, config, stream, noisy, world),
            checkpoints=Checkpoints(pathlib.Path(config.run.dir), world, config.run.keep_last),
            evaluator=evaluator,
            sinks=sinks,
            throughput=build_throughput(config, train, world),
            note=note,
            files={
                "config.yaml": dump(config).encode(),
                MODEL_FILE: tokenizer.model_bytes,
                **adapter_files(learner),
            },
            facts=facts,
            tokens_per_step=tokens_per_step(config, train),
            badness=functools.partial(badness, config.eval.metric),
        )
        if start.checkpoint:
            trainer.restore(start.checkpoint)
            note(f"resumed from {start.checkpoint} at step {trainer.done}")
        figures = trainer.fit() if config.train.steps else evaluate_only(trainer)
        summary = {}
        if not trainer.preempted:
            summary = summarise(trainer, figures, train, val, facts, started)
            finish(config, summary, world, note)
    finally:
        for sink in sinks:
            sink.close()
    close(world)
    return summary


def base_folder(config: TaskConfig) -> pathlib.Path:
    """The checkpoint that is fine-tuned; raises UserError when none is named."""
    require(
        config.init_from is not None,
        "nothing to fine-tune: set init_from to a run or checkpoint that nanolm wrote (with "
        "--weights random for its shape and tokenizer only)",
    )
    return locate(config.init_from, best=True)


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


def resolve(config: TaskConfig, task: type[Task], tokenizer: Tokenizer, train: Table) -> TaskConfig:
    """The config with all that data and tokenizer decide filled in: labels, metric, sizes."""
    config = build.resolve(config, tokenizer)
    require_fields(train, task.gold_fields(config.objective))
    options = task.resolve(config.objective, train)
    metric = config.eval.metric or task.metric
    return dataclasses.replace(
        config, objective=options, eval=dataclasses.replace(config.eval, metric=metric)
    )


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
    learner.objective.require_heads(fresh, str(base))
    told = [f"weights from {base}"]
    if fresh:
        told.append(f"fresh heads: {', '.join(f'heads.{name}' for name in fresh)}")
    if unused:
        told.append(f"unused of the checkpoint: {', '.join(f'heads.{name}' for name in unused)}")
    notes = ["; ".join(told)]
    if adapted:
        notes.append(begin_adapter(config, learner, fresh, base, checkpoint))
    return notes


def describe(train: Split, val: Split, learner: Learner) -> list[str]:
    """What is trained on what, in lines for the log."""
    total = sum(p.numel() for p in learner.parameters())
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    return [
        *train.notes,
        *val.notes,
        f"train {len(train.table):,} records ({len(train.items):,} rows, "
        f"{train.mean_tokens:.1f} tokens each), val {len(val.table):,}; {trained:,} of {total:,} "
        f"parameters are trained",
    ]


def build_evaluator(config: TaskConfig, split: Split, world: World) -> TaskEvaluator:
    """The evaluator of a split, in pieces no larger than a training micro-batch."""
    batch = config.eval.batch or config.train.micro_batch or config.train.global_batch
    limit = config.eval.batches and config.eval.batches * batch
    return TaskEvaluator(split, world, batch=batch, limit=limit, seed=config.run.seed)


def tokens_per_step(config: TaskConfig, train: Split) -> int:
    """Real tokens of an optimizer step, on average: padding is no throughput."""
    return max(1, round(train.mean_tokens * config.train.global_batch))


def build_throughput(config: TaskConfig, train: Split, world: World) -> Throughput:
    """The clock, counting real tokens; its model FLOPs leave the head out."""
    tokens = tokens_per_step(config, train)
    length = max(1, round(train.mean_tokens))
    flops = train_flops_per_token(config.model, length, predicted_share=0.0)
    peak, _ = peak_flops(world.device, config.train.precision)
    return Throughput(tokens, flops * tokens, peak and peak * world.size)


def badness(metric: str, figures: Mapping[str, float]) -> float:
    """What the best checkpoint has least of; raises UserError for a figure that there is not."""
    if metric not in figures:
        raise UserError(
            f"eval.metric={metric} is no figure of this task; there are {', '.join(figures)}"
        )
    return figures[metric] if metric in LOWER_IS_BETTER else -figures[metric]


def evaluate_only(trainer: Trainer) -> dict[str, float]:
    """Saves and evaluates the weights as they are: zero-shot, with train.steps=0."""
    trainer.snapshot.save()
    return trainer.evaluate(best=True)


def summarise(
    trainer: Trainer,
    figures: dict[str, float],
    train: Split,
    val: Split,
    facts: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """The run in a dozen figures, written to summary.json by rank 0."""
    config, learner = trainer.config, trainer.engine.learner
    metric = config.eval.metric
    best = trainer.snapshot.checkpoints.best()
    summary = {
        "steps": trainer.done,
        "tokens": trainer.done * trainer.tokens_per_step,
        "params": sum(p.numel() for p in learner.parameters()),
        "trained_params": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "train_records": len(train.table),
        "val_records": len(val.table),
        "metric": metric,
        "best_val": None if trainer.best is None else abs(trainer.best),
        "best_step": best and int(best.name.removeprefix("step-")),
        "val": figures,
        "tokens_per_second": trainer.throughput.overall,
        "seconds": time.perf_counter() - started,
        **facts,
    }
    if math.isnan(summary["tokens_per_second"]):
        summary["tokens_per_second"] = None
    if trainer.world.is_main:
        write_json(trainer.snapshot.checkpoints.run / "summary.json", summary)
    return summary


def finish(
    config: TaskConfig, summary: dict[str, Any], world: World, note: Callable[[str], None]
) -> None:
    """The model card, and one last line (rank 0)."""
    if not world.is_main:
        return
    run = pathlib.Path(config.run.dir)
    write_card(run, config, summary)
    best = summary["best_val"]
    if best is not None:
        note(f"best val {summary['metric']} {best:.4f} at step {summary['best_step']}; {run}")


if __name__ == "__main__":
    from nanolm.cli import main as command_line

    command_line(["finetune", *sys.argv[1:]])
