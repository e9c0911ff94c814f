"""Update: how one global batch's gradient is made, and how it moves the weights.

    g = gradient rule over this rank's micro-batches, summed over ranks        (gradient.py, rules/)
    g <- g * min(1, clip / |g|)          |g| is the norm over all parameters and ranks
    weights <- optimizer(weights, g, peak rate * schedule(step));  EMA follows

The Trainer (trainer.py) decides around it whether a gradient may move the weights at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanolm.config.schema import Config
from nanolm.distributed.sharding import whole
from nanolm.distributed.world import World
from nanolm.training.batch import MicroBatch
from nanolm.training.ema import ExponentialMovingAverage
from nanolm.training.engine import Engine
from nanolm.training.gradient import Backward
from nanolm.training.schedules import build_schedule
from nanolm.training.tuning import step_rule, tuned_optimizers


class Update:
    """Gradient rule, optimizers, schedule, loss scaler and averaged weights of one learner.

    Built after the engine: the optimizers hold the parameters as it has sharded them.
    """

    def __init__(self, engine: Engine, world: World, config: Config) -> None:
        self.engine, self.world, self.clip = engine, world, config.train.clip
        learner = engine.learner
        self.optimizers = tuned_optimizers(learner, config)
        self.factor = build_schedule(config.schedule, config.train.steps)
        self.rule = step_rule(learner, config)
        decay = config.train.ema
        self.ema = ExponentialMovingAverage(learner, decay) if decay else None
        fp16 = config.train.precision == "fp16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=fp16)

    def set_rates(self, done: int) -> float:
        """Gives every parameter group its learning rate after `done` steps; the first group's."""
        # A function of the steps done alone: no state to save, and a resumed run has the same rate.
        factor = self.factor(done)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        return self.optimizers[0].param_groups[0]["lr"]

    def gradient(
        self,
        micro_batches: Sequence[MicroBatch],
        weights: Mapping[str, float],
        done: int,
        seed: int,
    ) -> tuple[Backward, float]:
        """The gradient of step `done` + 1, in `.grad`, and its norm; collective.

        `weights` are those of the objective's terms, `seed` is this rank's dropout. Returns the
        pass with its target counts and this rank's sums of the terms.
        """
        # Dropout draws from a generator that is set anew in each step: no generator state has to be
        # saved, and a step that is replayed drops the same units.
        torch.manual_seed(seed)
        progress = self.engine.progress
        progress.enter("communication")
        names = list(weights)
        # Counted before the first backward pass, since every pass divides by the count of the whole
        # step. To divide by each micro-batch's own count and average afterwards would weigh a
        # target in a short micro-batch more than one in a long micro-batch.
        mine = [sum(batch.counts.get(name, 0) for batch in micro_batches) for name in names]
        counts = dict(zip(names, self.world.all_sum(mine), strict=True))
        backward = Backward(weights, counts, self._scaled, done)
        self.rule(self.engine, micro_batches, backward)
        progress.enter("optimizer")
        # fp16 multiplied the loss, and so the gradient, to keep it in range: taken back before the
        # norm is measured, or clipping would compare a norm that is thousands of times too large.
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        # One norm over all parameters, not one a tensor: clipping then shortens the gradient and
        # leaves its direction (Pascanu et al. 2013).
        norm = torch.nn.utils.get_total_norm(self._gradients())
        # The host waits here, once a step: it decides whether the weights move, and tells the log.
        # (fp16's scaler waits beside it, to learn what overflowed.)
        return backward, float(whole(norm) if self.engine.sharded else norm)

    def _scaled(self, total: Tensor) -> Tensor:
        """The loss as it goes into a backward pass, which begins now."""
        self.engine.progress.enter("backward")
        return self.scaler.scale(total)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.engine.learner.parameters() if p.grad is not None]

    def apply(self, norm: float) -> None:
        """Moves the weights by the gradient, which has this norm, and their average after them."""
        # Clip, step, average, in this order. Clipped before the step, so that an outlier does not
        # enter the optimizer's moments at full size; averaged after it, since the average is over
        # weights that a step has reached.
        if self.clip is not None and norm > self.clip:
            torch._foreach_mul_(self._gradients(), self.clip / norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()

    def leave_weights(self, finite_loss: bool) -> bool:
        """Leaves the weights as they are; whether fp16's range is to blame, and not the step.

        A gradient that overflowed at a finite loss means that the loss scale was too high: it is
        halved, down to 1.
        """
        if not self.scaler.is_enabled():
            return False
        scale = self.scaler.get_scale()
        overflow = finite_loss and scale > 1
        self.scaler.update(scale / 2 if overflow else scale)
        return overflow

    def clear(self) -> None:
        """Frees the gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
