"""Fine-tuning: `torchrun -m nanolm.finetune --config …`, the same as `nanolm finetune`.

`run_finetune` is the table of contents, as `pretrain.py` is for pretraining. The trainer,
loader, checkpoints and resume are the same; what differs is where rows come from (a labelled
table), what reads the hidden states (a task's fresh head) and how a validation figure chooses the
best checkpoint. All that is built in `finetune/prepare.py`.
"""

from __future__ import annotations

import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch

from nanolm import build
from nanolm.checkpoint.checkpoints import Checkpoints, locate, read_trainer
from nanolm.checkpoint.container import write_json
from nanolm.checkpoint.run_folder import claim
from nanolm.config import strict_yaml
from nanolm.config.load import dump, load_config, read_files, split_words
from nanolm.data.tokenizer import MODEL_FILE
from nanolm.distributed.world import World, close, launch, undivided
from nanolm.finetune.augment import Augmented
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.model_card import write_card
from nanolm.finetune.prepare import (
    badness,
    build_evaluator,
    build_throughput,
    check_scope,
    describe,
    open_stream,
    prepare,
    start_weights,
    tokens_per_step,
)
from nanolm.finetune.repeats import is_repeated, run_repeats
from nanolm.finetune.splits import Split
from nanolm.peft.files import adapter_files
from nanolm.training.loader import steps
from nanolm.training.sinks import open_sinks
from nanolm.training.trainer import Trainer

ShapeOf = Callable[[str], dict[str, Any]]


def main(argv: list[str]) -> None:
    """Reads the command line and fine-tunes, once or for every seed and fold."""
    config = load_task_config(argv)
    if is_repeated(config):
        run_repeats(config, run_finetune)
    else:
        run_finetune(config)


def base_model(path: str) -> dict[str, Any]:
    """The saved `model` group of a run or checkpoint."""
    return strict_yaml.read_mapping(locate(path, best=True) / "config.yaml")["model"]


def load_task_config(argv: list[str], shape_of: ShapeOf = base_model) -> TaskConfig:
    """The run's config; the group `model` starts from that of the checkpoint in `init_from`."""
    words = split_words(argv)
    named = words.get("init_from") or [read_files(dict(words), {}).get("init_from")]
    base = {"model": shape_of(named[0])} if named[0] not in (None, "null") else {}
    return load_config(argv, schema=TaskConfig, prog="nanolm finetune", base=base)


def run_finetune(config: TaskConfig) -> dict[str, Any]:
    """Fine-tunes as the config says; returns the summary, empty when a signal ended the run.

    Raises UserError for anything the user can mend, before anything is trained.
    """
    started = time.perf_counter()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    ready = prepare(config)
    config, task, train, val = ready.config, ready.task, ready.train, ready.val
    noisy = Augmented(task, config.augment, ready.tokenizer) if config.augment.used else task
    world = launch(config.distributed, config.run.device)
    check_scope(config, task, world)
    start = claim(
        pathlib.Path(config.run.dir),
        config.resume,
        dump(config),
        ready.facts,
        world,
        shared=config.run.shared,
    )
    learner = build.build_learner(config, task, world.device)
    told = start_weights(config, ready.base, learner, start.checkpoint)
    done = read_trainer(start.checkpoint)["step"] if start.checkpoint else 0
    sinks, note = open_sinks(config, world, done)
    alone = undivided(config.distributed, world)
    for line in [*start.notes, *alone, *told, *describe(train, val, learner)]:
        note(line)
    stream = open_stream(config, task, train)
    evaluator = build_evaluator(config, val, world)
    try:
        trainer = Trainer(
            config,
            learner,
            world,
            functools.partial(steps, config, stream, noisy, world),
            checkpoints=Checkpoints(
                pathlib.Path(config.run.dir),
                world,
                config.run.keep_last,
                shared=config.run.shared,
            ),
            evaluator=evaluator,
            sinks=sinks,
            throughput=build_throughput(config, train, world),
            note=note,
            files={
                "config.yaml": dump(config).encode(),
                MODEL_FILE: ready.tokenizer.model_bytes,
                **adapter_files(learner),
            },
            facts=ready.facts,
            tokens_per_step=tokens_per_step(config, train),
            badness=functools.partial(badness, config.eval.metric),
        )
        if start.checkpoint:
            trainer.restore(start.checkpoint)
            note(f"resumed from {start.checkpoint} at step {trainer.done}")
        figures = trainer.fit() if config.train.steps else evaluate_only(trainer)
        summary = {}
        if not trainer.preempted:
            summary = summarise(trainer, figures, train, val, ready.facts, started)
            finish(config, summary, world, note)
    finally:
        for sink in sinks:
            sink.close()
    close(world)
    return summary


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
