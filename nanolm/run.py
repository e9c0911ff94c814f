"""What a run is, told once: pretraining and fine-tuning are both a `Plan` that `carry_out` follows.

    threads -> launch -> run folder -> learner -> first weights -> metric sinks -> Trainer
    -> restore -> fit -> summary -> close

A plan is what can be read and checked before anything is launched, with the few things in which
kinds of run differ: where the first weights come from, what is evaluated, which figures matter.
Who measures or replays a run (`profile`, `doctor`, the benches) has its trainer from `rehearse`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nanolm.build import build_chooser, build_learner, initialiser
from nanolm.checkpoint.checkpoints import Checkpoints
from nanolm.checkpoint.run_folder import open_run_folder, release
from nanolm.config.load import dump
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.distributed.world import World, close, launch, undivided
from nanolm.errors import UserError
from nanolm.files import RESUME, write_json
from nanolm.learner import Learner
from nanolm.objectives.base import Objective
from nanolm.ops.kept import Record, read_records
from nanolm.peft.base import trainable_counts
from nanolm.peft.files import adapter_files
from nanolm.training.evaluation import Evaluate
from nanolm.training.loader import RowObjective, Stream, steps
from nanolm.training.schedules import build_schedule
from nanolm.training.sinks import open_sinks
from nanolm.training.throughput import Throughput
from nanolm.training.trainer import Trainer

Note = Callable[[str], None]


@dataclasses.dataclass(kw_only=True)
class Plan:
    """A run that is checked and ready to be launched.

    As it stands here it trains initial weights and evaluates nothing, which is what a bench needs;
    `pretrain.Pretraining` and `finetune.run.FineTuning` are the plans of real runs. `facts` are
    hashes of data and tokenizer, which a resumed run must match.
    """

    config: Config
    objective: Objective
    stream: Stream
    tokenizer: Tokenizer | None = None
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def examples(self) -> RowObjective:
        """What makes examples of the rows: the objective, unless the training rows are changed."""
        return self.objective

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step that do count."""
        return self.config.train.global_batch * self.config.data.row_length

    def check(self, world: World) -> None:
        """Raises UserError when these ranks cannot train it."""

    def start_weights(self, learner: Learner, checkpoint: pathlib.Path | None) -> list[str]:
        """Fills a fresh learner, which a run may go on to restore from `checkpoint`, and puts its
        adapter on; returns what to tell the user."""
        return []

    def evaluator(self, world: World) -> Evaluate | None:
        """What gives the figures of the validation split."""
        return None

    def throughput(self, world: World, note: Note) -> Throughput:
        """The clock; `note` is told what it assumes."""
        return Throughput(self.tokens_per_step, 0.0, None)

    def selection_score(self, figures: Mapping[str, float]) -> float:
        """What the best checkpoint has least of."""
        return figures["loss"]

    def summarise(self, trainer: Trainer, figures: Mapping[str, float]) -> dict[str, Any]:
        """Figures that this kind of run adds to its summary; `figures` are the last evaluation."""
        return {}

    def finish(self, summary: Mapping[str, Any], note: Note) -> None:
        """What rank 0 writes and says at the end."""


def carry_out(plan: Plan) -> dict[str, Any]:
    """Trains as planned; returns the summary, which is empty when a signal ended the run.

    Raises UserError for anything the user can mend, and KeyboardInterrupt when that signal was
    Ctrl-C, after all that it interrupts was saved. A run that fails before its first checkpoint
    leaves its folder to the mended command.
    """
    started, config = time.perf_counter(), plan.config
    build_schedule(config.schedule, config.train.steps)  # refused before the run has a folder
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    world = launch(config.distributed, config.run.device, "--run.device")
    plan.check(world)
    run, shared = pathlib.Path(config.run.dir), config.run.shared
    start = open_run_folder(run, config.resume, config, plan.facts, world, shared=shared)
    # A model that no rank could hold whole is drawn by its shards; one that starts from another
    # run's weights has to be built first.
    meta = config.distributed.strategy != "ddp" and world.size > 1 and config.init_from is None
    chooser = build_chooser(config, read_records(start.saved))
    learner = build_learner(config, plan.objective, world.device, meta=meta, chooser=chooser)
    told = plan.start_weights(learner, start.checkpoint)
    # Before the sinks: a thread of theirs would take half of a CPU's measured peak (docs/LOG.md).
    throughput = plan.throughput(world, told.append)
    with start.lock, open_sinks(config, world, start.done) as (sinks, note):
        for line in [*start.messages, *undivided(config.distributed, world), *told]:
            note(line)
        trainer = assemble(
            plan,
            learner,
            world,
            Checkpoints(run, world, config.run.keep_last, shared=shared),
            note,
            evaluator=plan.evaluator(world),
            sinks=sinks,
            throughput=throughput,
        )
        throughput.resume(0.0, 0)  # the clock starts here
        trainer.state.began = started
        if start.checkpoint:
            trainer.restore(start.checkpoint, start.saved or {})
            note(f"resumed from {start.checkpoint} at step {trainer.state.done}")
        for line in chooser.notes:
            note(line)
        try:
            figures = trainer.fit()
        except UserError:
            if world.is_main:
                release(run)
            raise
        summary: dict[str, Any] = {}
        if not trainer.preempted:
            summary = summarise(plan, trainer, figures)
            if world.is_main:
                write_json(run / "summary.json", summary, again=RESUME)
                plan.finish(summary, note)
    close(world)
    if trainer.preempted and trainer.preemption.signal == signal.SIGINT.name:
        raise KeyboardInterrupt
    return summary


def assemble(
    plan: Plan, learner: Learner, world: World, checkpoints: Checkpoints, note: Note, **rest: Any
) -> Trainer:
    """The trainer of a plan: the one place where a Trainer is put together."""
    config = plan.config
    tokenizer = plan.tokenizer
    model = {} if tokenizer is None else {tokenizer.file_name: tokenizer.model_bytes}
    return Trainer(
        config,
        learner,
        world,
        functools.partial(steps, config, plan.stream, plan.examples, world),
        checkpoints=checkpoints,
        note=note,
        files={"config.yaml": dump(config).encode(), **model, **adapter_files(learner)},
        facts=plan.facts,
        tokens_per_step=plan.tokens_per_step,
        selection_score=plan.selection_score,
        initialise=initialiser(config),
        kernels=getattr(learner.trunk, "kernels", None),
        **rest,
    )


def rehearse(
    plan: Plan,
    world: World,
    scratch: pathlib.Path,
    note: Note = print,
    checkpoint: pathlib.Path | None = None,
    kept: Sequence[Record] = (),
) -> Trainer:
    """The plan's trainer before its first step, for who measures or replays steps: nothing is
    logged or evaluated, and what it writes goes to the scratch folder.

    `checkpoint` is one that it will be restored from, and `kept` the records of its kernels.
    """
    chooser = build_chooser(plan.config, kept)
    learner = build_learner(plan.config, plan.objective, world.device, chooser=chooser)
    for line in plan.start_weights(learner, checkpoint):
        note(line)
    trainer = assemble(plan, learner, world, Checkpoints(scratch, world), note)
    for line in chooser.notes:
        note(line)
    return trainer


def summarise(plan: Plan, trainer: Trainer, figures: Mapping[str, float]) -> dict[str, Any]:
    """The run in a dozen figures; times are those of all its starts."""
    trained = trainer.state.done
    return {
        "steps": trained,
        "tokens": trained * trainer.tokens_per_step,
        "params": trainable_counts(trainer.engine.learner)[1],
        **plan.summarise(trainer, figures),
        "tokens_per_second": trainer.throughput.overall if trained else None,
        "seconds": trainer.state.elapsed,
        **plan.facts,
    }
