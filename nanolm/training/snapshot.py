"""Snapshot: everything of a trainer that a checkpoint holds, and how it goes back in.

model.safetensors      weights, by name, tied ones once
optimizer.safetensors  <parameter name>/<key>
ema.safetensors        averaged weights, when there are any
trainer.json           the RunState, random scheme, environment, hashes of data and tokenizer,
                       and the kernels
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanolm.checkpoint.background import Background
from nanolm.checkpoint.checkpoints import Checkpoints, read_trainer
from nanolm.checkpoint.container import verify
from nanolm.checkpoint.lazy_tensors import LazyTensors
from nanolm.checkpoint.named_tensors import (
    learner_tensors,
    load_named,
    load_optimizers,
    optimizer_tensors,
)
from nanolm.checkpoint.run_folder import environment
from nanolm.checkpoint.spread_tensors import SpreadTensors
from nanolm.config.schema import Config
from nanolm.errors import UserError
from nanolm.ops.contract import Kernels
from nanolm.ops.kept import records
from nanolm.training.guards.diagnosis import first_bad
from nanolm.training.run_state import RunState
from nanolm.training.update import Update


class Snapshot:
    """Saves and restores one trainer: its learner, optimizers and averages, and its state."""

    def __init__(
        self,
        update: Update,
        state: RunState,
        config: Config,
        checkpoints: Checkpoints,
        tokens_per_step: int,
        files: Mapping[str, bytes] | None = None,
        facts: Mapping[str, Any] | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.kernels = kernels
        self.update, self.state, self.config = update, state, config
        self.checkpoints = checkpoints
        self.tokens_per_step = tokens_per_step
        self.files = files or {}
        self.facts = facts or {}
        self.background = Background()
        self._with_own_group: Checkpoints | None = None

    def wait(self) -> None:
        """Waits until the checkpoint in flight is whole; raises UserError when it could not be."""
        self.background.wait()

    def save(self) -> pathlib.Path:
        """Writes the checkpoint of the trainer's present step; collective.

        With run.checkpoint_async the tensors are copied to host memory, after the checkpoint
        before is whole, and written while training goes on.
        """
        update, checkpoints = self.update, self.checkpoints
        tensors = {
            "model": learner_tensors(update.engine.learner),
            "optimizer": optimizer_tensors(update.optimizers),
        }
        if update.ema is not None:
            tensors["ema"] = update.ema.tensors
        parts, content = checkpoints.own_parts(tensors), self._json()
        if not self.config.run.checkpoint_async:
            return checkpoints.write(self.state.done, parts, content, self.files)
        self.wait()
        self._with_own_group = self._with_own_group or checkpoints.with_own_group()
        copies = {
            name: {key: tensor.to("cpu", copy=True) for key, tensor in named.items()}
            for name, named in parts.items()
        }
        write = self._with_own_group.write
        self.background.start(lambda: write(content["step"], copies, content, self.files))
        return checkpoints.path(self.state.done)

    def rewind(self) -> pathlib.Path:
        """Fills the trainer from the newest checkpoint that is intact and finite; collective.

        Counters that tell how often the run went wrong are not turned back. Raises UserError when
        there is no such checkpoint.
        """
        self.wait()
        skips = self.state.skips
        step = self._last_good()
        if step is None:
            raise UserError(
                f"nothing to rewind to in {self.checkpoints.folder}: lower run.checkpoint_every, "
                f"or set train.nonfinite to skip"
            )
        for optimizer in self.update.optimizers:
            optimizer.state.clear()
        folder = self.checkpoints.path(step)
        self.restore(folder, read_trainer(folder))
        self.state.skips = skips
        return folder

    def _last_good(self) -> int | None:
        """Step of the newest checkpoint that is good for all who lead; collective."""
        own, world = self.checkpoints, self.update.world
        steps = set().union(*world.gather(own.steps() if own.leads else []))
        for step in sorted(steps, reverse=True):
            if all(world.gather(not own.leads or is_good(own.path(step)))):
                return step
        return None

    def _json(self) -> dict[str, Any]:
        done, config = self.state.done, self.config
        return {
            **self.state.to_json(),
            "tokens": done * self.tokens_per_step,
            "data": {
                "next_step": done,
                "global_batch": config.train.global_batch,
            },
            "random": {
                "seed": config.run.seed,
                "scheme": "torch seeded before each step from (seed, step, rank); rows from "
                "(seed, epoch, row id)",
            },
            "folder": os.getcwd(),
            "environment": environment(self.update.world),
            "facts": dict(self.facts),
            "kernels": records(self.kernels.choices.values()) if self.kernels else [],
        }

    def restore(self, folder: pathlib.Path, saved: Mapping[str, Any]) -> None:
        """Fills the trainer from a verified checkpoint, whose trainer.json has been read.

        Raises UserError naming the first tensor that does not fit, before anything of the
        optimizers is touched.
        """
        update, what = self.update, f"checkpoint {folder}"
        load_named(learner_tensors(update.engine.learner), self._open(folder, "model"), what)
        load_optimizers(update.optimizers, self._open(folder, "optimizer"), what)
        if update.ema is not None:
            load_named(update.ema.tensors, self._open(folder, "ema"), what)
        if saved["step"] > self.config.train.steps:
            raise UserError(
                f"{what} is at step {saved['step']}, beyond train.steps="
                f"{self.config.train.steps}; raise train.steps"
            )
        self.state.restore(saved)

    def _open(self, folder: pathlib.Path, part: str) -> Mapping[str, Tensor]:
        """The tensors of a part: of this folder, or of all nodes' folders together."""
        if self.checkpoints.shared:
            return LazyTensors(folder, part)
        return SpreadTensors(folder, part, self.update.world)


def is_good(folder: pathlib.Path) -> bool:
    """Whether what this folder holds of a checkpoint is intact and its weights are finite."""
    try:
        verify(folder)
    except UserError:
        return False
    return first_bad(LazyTensors(folder, "model", whole=False).items()) is None
