"""Snapshot: everything of a trainer that a checkpoint holds, and how it goes back in.

model.safetensors      weights, by name, tied ones once
optimizer.safetensors  <parameter name>/<key>
ema.safetensors        averaged weights, when there are any
trainer.json           step (which is the data position too: order and masks follow from it),
                       loss scaler, random scheme, environment, hashes of data and tokenizer
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanolm.checkpoint import Checkpoints, read_trainer
from nanolm.container import verify
from nanolm.diagnosis import first_bad
from nanolm.errors import UserError
from nanolm.lazy_tensors import LazyTensors
from nanolm.runfolder import environment
from nanolm.state import learner_tensors, load_named, load_optimizers, optimizer_tensors

if TYPE_CHECKING:
    from nanolm.trainer import Trainer


class Snapshot:
    """Saves and restores one trainer."""

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        files: Mapping[str, bytes],
        facts: Mapping[str, Any],
    ) -> None:
        self.trainer = trainer
        self.checkpoints = checkpoints
        self.files = files
        self.facts = facts

    def save(self) -> pathlib.Path:
        """Writes the checkpoint of the trainer's present step; collective."""
        trainer = self.trainer
        tensors = {
            "model": learner_tensors(trainer.engine.learner),
            "optimizer": optimizer_tensors(trainer.optimizers),
        }
        if trainer.ema is not None:
            tensors["ema"] = trainer.ema.tensors
        return self.checkpoints.save(trainer.done, tensors, self._json(), self.files)

    def rewind(self) -> pathlib.Path:
        """Fills the trainer from the newest checkpoint that is intact and finite; collective.

        Counters that tell how often the run went wrong are not turned back. Raises UserError when
        there is no such checkpoint.
        """
        skips = self.trainer.policy.skips
        self.trainer.policy.losses.clear()
        folder = self.trainer.world.broadcast(self._last_good())
        if folder is None:
            raise UserError(
                f"nothing to rewind to in {self.checkpoints.folder}: lower run.checkpoint_every, "
                f"or set train.nonfinite to skip"
            )
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
        self.restore(pathlib.Path(folder))
        self.trainer.policy.skips = skips
        return pathlib.Path(folder)

    def _last_good(self) -> str | None:
        """Rank 0's choice; other ranks are told."""
        if not self.trainer.world.is_main:
            return None
        for step in reversed(self.checkpoints.steps()):
            folder = self.checkpoints.path(step)
            if is_good(folder):
                return str(folder)
        return None

    def _json(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "step": trainer.done,
            "tokens": trainer.done * trainer.tokens_per_step,
            "data": {"next_step": trainer.done, "global_batch": trainer.config.train.global_batch},
            "random": {
                "seed": trainer.config.run.seed,
                "scheme": "torch seeded before each step from (seed, step, rank); rows from "
                "(seed, epoch, row id)",
            },
            "best": trainer.best,
            "skips": trainer.policy.skips,
            "losses": list(trainer.policy.losses),
            "seconds": trainer.throughput.total_seconds,
            "scaler": trainer.scaler.state_dict(),
            "environment": environment(trainer.world),
            "facts": dict(self.facts),
        }

    def restore(self, folder: pathlib.Path) -> None:
        """Fills the trainer from a verified checkpoint.

        Raises UserError naming the first tensor that does not fit, before anything of the
        optimizers is touched.
        """
        trainer, what = self.trainer, f"checkpoint {folder}"
        saved = read_trainer(folder)
        load_named(learner_tensors(trainer.engine.learner), LazyTensors(folder, "model"), what)
        load_optimizers(trainer.optimizers, LazyTensors(folder, "optimizer"), what)
        if trainer.ema is not None:
            load_named(trainer.ema.tensors, LazyTensors(folder, "ema"), what)
        if saved["step"] > trainer.config.train.steps:
            raise UserError(
                f"{what} is at step {saved['step']}, beyond train.steps="
                f"{trainer.config.train.steps}; raise train.steps"
            )
        trainer.done = saved["step"]
        trainer.best = saved["best"]
        trainer.policy.skips = saved["skips"]
        trainer.policy.losses.extend(saved["losses"])
        trainer.throughput.total_seconds = saved["seconds"]
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(saved["scaler"])


def is_good(folder: pathlib.Path) -> bool:
    """Whether a checkpoint is intact and all its weights are finite."""
    try:
        verify(folder)
    except UserError:
        return False
    return first_bad(LazyTensors(folder, "model").items()) is None
