"""Trainer: steps, checkpoints, evaluations. One for pretraining and fine-tuning; it knows no model.

One optimizer step:

    micro-batches -> count targets over all ranks -> gradient rule (forward, backward, all-reduce)
    -> agree on loss, gradient norm and signals -> clip -> optimizers -> EMA        (update.py)

After step s, in this order: its metrics line, its checkpoint, its evaluation. A resumed run repeats
what may be missing of that, so its metrics file ends like an undisturbed run's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch

from nanolm.checkpoint.checkpoints import Checkpoints
from nanolm.config.schema import Config
from nanolm.distributed.world import World, peer_lost
from nanolm.errors import UserError
from nanolm.learner import Learner
from nanolm.ops.contract import Kernels
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine, Initialise
from nanolm.training.evaluation import Evaluate
from nanolm.training.gradient import Backward, total_loss
from nanolm.training.guards.nonfinite import NonFinitePolicy
from nanolm.training.guards.patience import Patience
from nanolm.training.guards.preemption import Preemption
from nanolm.training.guards.watchdog import Watchdog
from nanolm.training.guards.weight_check import compare_weights
from nanolm.training.phases import StragglerMonitor
from nanolm.training.run_state import RunState
from nanolm.training.schedules import redrawn
from nanolm.training.sinks import Sink
from nanolm.training.snapshot import Snapshot
from nanolm.training.throughput import Throughput
from nanolm.training.tuning import freeze
from nanolm.training.update import Update

LoaderFactory = Callable[[int], Generator[Sequence[MicroBatch], None, None]]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What all ranks agree on after a step: means of the terms, and whether weights moved."""

    loss: float
    terms: dict[str, float]
    lr: float
    grad_norm: float
    applied: bool
    stop: bool
    rewound: bool = False


class Trainer:
    """Trains one learner. Every method that steps, saves or evaluates is collective.

    `loader_factory(step)` iterates over lists of micro-batches from optimizer step `step` on: this
    rank's share of each global batch, at least one (a stand-in without rows when it has none).
    `tokens_per_step` is global_batch full rows unless given; the checkpoint whose validation
    figures have the least `selection_score` is the best one. `initialise` is handed to the Engine.
    Checkpoints keep what `kernels` chose.
    """

    def __init__(
        self,
        config: Config,
        learner: Learner,
        world: World,
        loader_factory: LoaderFactory,
        *,
        checkpoints: Checkpoints,
        evaluator: Evaluate | None = None,
        sinks: Sequence[Sink] = (),
        throughput: Throughput | None = None,
        note: Callable[[str], None] = print,
        files: Mapping[str, bytes] | None = None,
        facts: Mapping[str, Any] | None = None,
        tokens_per_step: int | None = None,
        selection_score: Callable[[Mapping[str, float]], float] = lambda figures: figures["loss"],
        initialise: Initialise | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.config, self.world, self.note = config, world, note
        freeze(learner, config.tune)
        self.engine = engine = Engine(learner, world, config, initialise=initialise)
        self.loader_factory, self.evaluator, self.sinks = loader_factory, evaluator, sinks
        self.update = Update(self.engine, world, config)
        rows = config.train.global_batch
        self.tokens_per_step = tokens_per_step or rows * config.data.row_length
        self.selection_score = selection_score
        self.throughput = throughput or Throughput(self.tokens_per_step, 0.0, None)
        self.straggler_monitor = StragglerMonitor(world, note)
        self.progress, self.preemption, self.preempted = engine.progress, Preemption(), False
        self.patience = Patience(config.eval.patience)
        self.state = RunState(self.patience, self.throughput, self.update.scaler)
        self.policy = NonFinitePolicy(config.train, world, checkpoints.run, self.state)
        tokens, kept = self.tokens_per_step, (files, facts, kernels)
        self.snapshot = Snapshot(self.update, self.state, config, checkpoints, tokens, *kept)
        self._resumed = False

    def restore(self, checkpoint: pathlib.Path, saved: Mapping[str, Any]) -> None:
        """Continues from a verified checkpoint's folder and its trainer.json: weights, optimizers,
        averages, counters."""
        self.snapshot.restore(checkpoint, saved)
        # Checkpoints of early versions know the seconds of their steps only.
        self.state.earlier = saved.get("elapsed", saved["seconds"])
        self._resumed = True
        for line in redrawn(self.config, checkpoint / "config.yaml", self.state.done):
            self.note(line)

    def fit(self) -> dict[str, float]:
        """Trains up to train.steps, or until eval.patience is over; returns the last figures.

        A signal ends it early too, with a checkpoint: `preempted` is then true. Raises UserError
        when a loss is not finite, the disk is full or a peer is gone.
        """
        seconds, run = self.config.distributed.hang_seconds, self.snapshot.checkpoints.run
        with self.preemption, Watchdog(self.world, self.progress, seconds, run):
            try:
                figures = self._fit()
                self.snapshot.wait()
                return figures
            except RuntimeError as error:
                if self.world.size == 1 or not peer_lost(error):
                    raise
                raise UserError(
                    f"a peer is gone during step {self.state.done + 1}; nothing was saved since "
                    f"the last checkpoint; run again with --resume auto"
                ) from error

    def _fit(self) -> dict[str, float]:
        if not self.config.train.steps:  # only to judge the weights as they are
            self.snapshot.save()
            return self.evaluate(saved=True)
        figures: dict[str, float] = {}
        if self._resumed and self._due(self.config.eval.every):
            figures = self.evaluate(saved=True)
        warmed_up = False
        while not self._over:
            with contextlib.closing(iter(self.loader_factory(self.state.done))) as batches:
                for micro_batches, waited in self._timed(batches):
                    if not warmed_up:
                        self.engine.warm_up_ddp(micro_batches[0], self.weights)
                        warmed_up = True
                    result = self.step(micro_batches)
                    self.throughput.add_step(waited)
                    figures = self._after_step(result) or figures
                    if result.rewound:
                        break
        if self.patience.over:
            self.note(
                f"stopped after step {self.state.done} of {self.config.train.steps}: "
                f"{self.patience.stale} evaluations in a row without a new best"
            )
        return figures

    @property
    def _over(self) -> bool:
        """Whether no further step is to be taken."""
        return self.state.done >= self.config.train.steps or self.preempted or self.patience.over

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each optimised term."""
        return self.engine.learner.objective.weights

    def _timed(
        self, batches: Iterator[Sequence[MicroBatch]]
    ) -> Iterator[tuple[Sequence[MicroBatch], float]]:
        """Micro-batches of each step that is left, and the seconds spent waiting for them."""
        while not self._over:
            self.progress.enter("data", self.state.done + 1)
            start = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - start
            yield self.engine.pad_passes(micro_batches), waited

    def seed(self) -> int:
        """Seed of this rank's dropout in the next step: no generator state outlives a step."""
        mixed = (self.config.run.seed * 1_000_003 + self.state.done) * 1_000_003 + self.world.rank
        return mixed % (1 << 63)

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """One optimizer step on this rank's share of a global batch; collective."""
        if self.state.done + 1 in self.policy.passed:
            return self._pass_over()
        lr = self.update.set_rates(self.state.done)
        # All ranks get the same loss and norm, so they decide alike what follows, without asking.
        terms, norm, counts, stop = self.step_gradient(micro_batches)
        self.progress.enter("optimizer")
        loss = total_loss(terms, self.weights)
        # Judged before anything moves: one NaN would stay in every weight and in Adam's moments.
        applied, rewound = self.policy.accepts(loss, norm), False
        if applied:
            self.update.apply(norm)
            self.policy.good(self.state.done + 1, loss)
        else:
            rewound = self._leave_bad_step(micro_batches, loss, counts)
        self.update.clear()
        # A skipped step counts, or its rows would come again; a rewind has set the count itself.
        if not rewound:
            self.state.done += 1
        return StepResult(loss, terms, lr, norm, applied, stop, rewound)

    def step_gradient(
        self, micro_batches: Sequence[MicroBatch]
    ) -> tuple[dict[str, float], float, Mapping[str, float], bool]:
        """The next step's gradient, in `.grad`, with the terms' means, its norm, the target counts
        and whether any rank was told to stop; collective."""
        done, seed = self.state.done, self.seed()
        backward, norm = self.update.gradient(micro_batches, self.weights, done, seed)
        self.progress.enter("communication")
        terms, stop = self._global_means(backward)
        return terms, norm, backward.counts, stop

    def _pass_over(self) -> StepResult:
        """A step whose rows a rewind wants skipped: nothing is computed and nothing moves."""
        self.progress.enter("communication")
        stop = self.world.all_sum([self.preemption.signal is not None])[0] > 0
        self.state.done += 1
        lr = self.update.set_rates(self.state.done)
        return StepResult(math.nan, {}, lr, math.nan, False, stop)

    def _global_means(self, backward: Backward) -> tuple[dict[str, float], bool]:
        """Global means of all terms, and whether any rank was told to stop: then all stop here."""
        names = sorted(backward.sums)
        flat = [backward.sums[name] for name in names] + [backward.seen[name] for name in names]
        values = torch.stack(flat).tolist()  # the gradient's norm has been waited for already
        flags = [self.preemption.signal is not None, self.snapshot.background.error is not None]
        *total, stop, failed = self.world.all_sum([*values, *flags])
        if failed:
            self.snapshot.wait()
        pairs = zip(names, total[: len(names)], total[len(names) :], strict=True)
        return {name: value / max(count, 1) for name, value, count in pairs}, stop > 0

    def _leave_bad_step(
        self, micro_batches: Sequence[MicroBatch], loss: float, counts: Mapping[str, float]
    ) -> bool:
        """A bad step moves no weight; the policy says whether the run goes on, and from where.

        Returns whether the trainer went back to a checkpoint.
        """
        if self.update.leave_weights(math.isfinite(loss) and not self.policy.spikes(loss)):
            return False
        step = self.state.done + 1
        told = self.policy.answer_bad_step(
            self.engine, micro_batches, step, self.seed(), loss, counts
        )
        if self.config.train.nonfinite != "rewind":
            self.note(told)
            return False
        folder = self.snapshot.rewind()
        self.note(f"{told}; back to {folder}")
        self._write({"step": step, "kind": "rewind", "to": self.state.done})
        return True

    def _due(self, every: int) -> bool:
        done = self.state.done
        return done == self.config.train.steps or bool(every and done % every == 0)

    def _saves(self) -> bool:
        """Whether this step gets a checkpoint; with eval.patience all that are evaluated do, since
        the run may end there and the best of them is what remains."""
        watched = self.config.eval.patience is not None and self._due(self.config.eval.every)
        return watched or self._due(self.config.run.checkpoint_every)

    def _after_step(self, result: StepResult) -> dict[str, float]:
        """Metrics line, checkpoint, evaluation, as they are due; the evaluation's figures."""
        config = self.config
        if result.rewound:
            return {}
        if self._due(config.run.log_every) or self.state.done == 1:
            self._write_train_line(result)
        if (every := config.distributed.compare_weights_every) and self.state.done % every == 0:
            compare_weights(self.engine.learner, self.world, self.state.done)
        self.progress.enter("checkpoint" if self.world.is_main else "waiting")
        save = self._saves()
        if save or result.stop:
            with self.throughput.excluded():
                self.snapshot.save()
        if result.stop:
            self._leave()
        elif self._due(config.eval.every):
            self.progress.enter("evaluation")
            with self.throughput.excluded():
                return self.evaluate(saved=save)
        return {}

    def _write_train_line(self, result: StepResult) -> None:
        record = {"step": self.state.done, "kind": "train", "loss": result.loss, **result.terms}
        record |= {"lr": result.lr, "grad_norm": result.grad_norm}
        record |= {"tokens": self.state.done * self.tokens_per_step}
        if not result.applied:
            record["skipped"] = True
        phases = self.progress.take_seconds()
        slowest = self.straggler_monitor.compare(phases)
        self._write(record | self.throughput.speeds(self.world.device) | phases | slowest)

    def _write(self, record: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def evaluate(self, *, saved: bool = False) -> dict[str, float]:
        """Figures of the validation split, with the averaged weights when there are any; the step
        whose selection score is the lowest so far becomes the best checkpoint.

        `saved` tells whether this step has a checkpoint already; the best one gets it here. A
        signal ends the evaluation: the run is left then, and evaluates when it is resumed.
        """
        if self.evaluator is None:
            return {}
        with self.update.ema.swapped() if self.update.ema else contextlib.nullcontext():
            figures = self.evaluator(self.engine, stop=lambda: self.preemption.signal is not None)
        if figures is None:
            if not saved:
                self.snapshot.save()
            self._leave()
            return {}
        self._write({"step": self.state.done, "kind": "val", **figures})
        selection_score = self.selection_score(figures)
        best = math.inf if self.state.best is None else self.state.best
        if self.config.run.keep_best and selection_score < best:  # never true of NaN
            if not saved:  # with the counters from before, since a resumed run evaluates again
                self.snapshot.save()
            self.snapshot.wait()
            self.snapshot.checkpoints.mark_best(self.state.done)
            self.state.best = selection_score
        self.patience.see(selection_score)
        return figures

    def _leave(self) -> None:
        self.snapshot.wait()
        self.preempted = True
        reason = self.preemption.signal or "a signal to another rank"
        self.snapshot.checkpoints.mark_preempted(self.state.done, reason)
        self.note(
            f"{reason}: saved after step {self.state.done} of {self.config.train.steps}; the same "
            f"command with --resume auto goes on from there"
        )
