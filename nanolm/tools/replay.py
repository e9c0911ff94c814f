"""Replay: a step of a finished or failed run once more, from the checkpoint before it.

checkpoint before the step -> the same rows, masks and dropout -> loss, norm, first bad tensor
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from nanolm import pretrain
from nanolm.checkpoint.checkpoints import Checkpoints, read_trainer
from nanolm.checkpoint.container import verify
from nanolm.checkpoint.facts import require_same_facts
from nanolm.checkpoint.run_folder import differences
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.distributed.world import World
from nanolm.errors import UserError, require
from nanolm.finetune import run as finetune
from nanolm.finetune.config import TaskConfig
from nanolm.ops.kept import read_records
from nanolm.run import Plan, rehearse
from nanolm.training.batch import MicroBatch
from nanolm.training.gradient import total_loss
from nanolm.training.guards.diagnosis import find_tensor
from nanolm.training.guards.nonfinite import read_passed
from nanolm.training.trainer import Trainer


def trainer_before(
    step: int, config: Config, folder: pathlib.Path, world: World, scratch: pathlib.Path
) -> tuple[Trainer, list[str]]:
    """The run's trainer as it stood at the last checkpoint before the step, or at its beginning;
    and what to tell the user. What it writes goes to the scratch folder.

    Raises UserError when there is no checkpoint to read a tokenizer from, or it is damaged.
    """
    require(
        step <= config.train.steps,
        f"step {step}: run {folder} is one of {config.train.steps} steps; choose one of them",
    )
    start = checkpoint_before(folder, step)
    notes = [f"from {start}" if start else "from the initial weights"]
    # A bad step on the way is skipped as the run skipped it, and never ends the replay.
    skipping = dataclasses.replace(config.train, nonfinite="skip", max_skips=step)
    config = dataclasses.replace(config, train=skipping)
    source = start or next(iter(sorted(folder.glob("checkpoints/step-*"))), None)
    if source is None:
        raise UserError(f"run {folder} holds no checkpoint, so no tokenizer to read its rows with")
    plan = plan_again(config, source)
    require_same_facts(
        source,
        plan.facts,
        "put what the run was trained on where its config.yaml says, to see its rows again",
    )
    saved = read_trainer(start) if start else None
    trainer = rehearse(plan, world, scratch, notes.append, start, read_records(saved))
    trainer.policy.passed = {bad for bad in read_passed(folder) if bad < step}
    if start and saved:
        trainer.restore(start, saved)
        notes += differences(saved["environment"], world)
    return trainer, notes


def plan_again(config: Config, source: pathlib.Path) -> Plan:
    """The run that a saved config describes; its tokenizer is that of the checkpoint `source`."""
    if isinstance(config, TaskConfig):
        return finetune.plan(config)
    return pretrain.plan(config, Tokenizer.load(source))


def checkpoint_before(folder: pathlib.Path, step: int) -> pathlib.Path | None:
    """The newest checkpoint of a step before this one; raises UserError when it is damaged."""
    if step < 1:
        raise UserError(f"step={step}: the first step of a run is 1")
    checkpoints = Checkpoints(folder, World())
    earlier = [saved for saved in checkpoints.steps() if saved < step]
    if not earlier:
        return None
    verify(checkpoints.path(earlier[-1]))
    return checkpoints.path(earlier[-1])


def replay(trainer: Trainer, step: int) -> Sequence[MicroBatch]:
    """Takes the steps up to the given one again; returns that one's micro-batches, not taken."""
    first = True
    for micro_batches in trainer.loader_factory(trainer.state.done):
        if first:
            trainer.engine.warm_up_ddp(micro_batches[0], trainer.weights)
            first = False
        if trainer.state.done + 1 == step:
            return micro_batches
        trainer.step(micro_batches)
    raise UserError(f"step {step} is beyond the data")


def examine(trainer: Trainer, micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Loss, gradient norm, rows and first bad tensor of the trainer's next step; collective."""
    terms, norm, counts, _ = trainer.step_gradient(micro_batches)
    tensor = find_tensor(trainer.engine, micro_batches, trainer.seed(), counts)
    found = trainer.world.gather(
        {"tensor": tensor, "rows": [int(row) for b in micro_batches for row in b.row_ids]}
    )
    bad = [rank for rank, entry in enumerate(found) if not entry["tensor"].startswith("none")]
    return {
        "loss": total_loss(terms, trainer.weights),
        **terms,
        "grad_norm": norm,
        "first non-finite tensor": found[bad[0]]["tensor"] if bad else "none",
        "rank": bad[0] if bad else "none",
        "rows": [row for entry in found for row in entry["rows"]],
    }
