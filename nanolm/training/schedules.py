"""Learning-rate schedules: pure functions of the step, so a checkpoint holds no scheduler.

`build_schedule(options, steps)` returns `factor(step)`, the share of the peak learning rate that
optimizer step `step` (counted from 0) of `steps` uses. All rise linearly over `warmup` steps,
(step + 1) / warmup, and differ after: with u in [0, 1) the part of the way from the end of the
warm-up to step `steps` (the one after the last), and f the floor,

    cosine        f + (1 - f) (1 + cos(pi u)) / 2        Loshchilov & Hutter 2017 (SGDR)
    linear        1 - (1 - f) u                          Devlin et al. 2019 (BERT)
    wsd           1, then over the last part linearly to f    Hu et al. 2024 (theirs: exponentially)
    inverse_sqrt  sqrt(warmup / (step + 1))              Vaswani et al. 2017
    constant      1
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable

from nanolm.config import strict_yaml
from nanolm.config.schema import Config
from nanolm.errors import UserError
from nanolm.registry import SCHEDULES, Options

Factor = Callable[[int], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupOptions(Options):
    """What every schedule has."""

    warmup: int = 0
    """Steps over which the learning rate rises linearly to its peak."""

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise UserError(f"schedule.warmup={self.warmup} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecayOptions(WarmupOptions):
    """Schedules that end at a floor."""

    floor: float = 0.1
    """The learning rate at the very end, as a share of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise UserError(f"schedule.floor={self.floor} must lie in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineOptions(DecayOptions):
    """Half a cosine from the peak to the floor."""

    name: str = "cosine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearOptions(DecayOptions):
    """A straight line from the peak to the floor."""

    name: str = "linear"
    floor: float = 0.0
    """The learning rate at the very end, as a share of the peak."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WsdOptions(DecayOptions):
    """Warm-up, stable, decay."""

    name: str = "wsd"
    floor: float = 0.0
    """The learning rate at the very end, as a share of the peak."""
    decay: float = 0.2
    """Share of all steps, at the end, over which the learning rate falls linearly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise UserError(f"schedule.decay={self.decay} must lie in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrtOptions(WarmupOptions):
    """Falls with one over the square root of the step."""

    name: str = "inverse_sqrt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantOptions(WarmupOptions):
    """Stays at the peak."""

    name: str = "constant"


def build_schedule(options: Options, steps: int) -> Factor:
    """`factor(step)` of the chosen schedule over `steps` optimizer steps.

    Raises UserError when the warm-up is longer than the run.
    """
    warmup = getattr(options, "warmup", 0)
    if warmup > steps > 0:
        raise UserError(
            f"schedule.warmup={warmup} is longer than train.steps={steps}; lower it or train longer"
        )
    after = SCHEDULES.get(options.name).build(options, steps)

    def factor(step: int) -> float:
        # step + 1: a first step at rate 0 would be a forward and a backward pass for nothing.
        return (step + 1) / warmup if step < warmup else after(step)

    return factor


def _way(step: int, start: int, steps: int) -> float:
    """How much of the way from step `start` to the end is done, in [0, 1]."""
    return min(max((step - start) / max(steps - start, 1), 0.0), 1.0)


@SCHEDULES.register("cosine", options=CosineOptions)
def cosine(options: CosineOptions, steps: int) -> Factor:
    """f + (1 - f) (1 + cos(pi u)) / 2."""

    def factor(step: int) -> float:
        wave = (1 + math.cos(math.pi * _way(step, options.warmup, steps))) / 2
        return options.floor + (1 - options.floor) * wave

    return factor


@SCHEDULES.register("linear", options=LinearOptions)
def linear(options: LinearOptions, steps: int) -> Factor:
    """1 - (1 - f) u."""
    return lambda step: 1 - (1 - options.floor) * _way(step, options.warmup, steps)


@SCHEDULES.register("wsd", options=WsdOptions)
def wsd(options: WsdOptions, steps: int) -> Factor:
    """1, then linearly to f over the last `decay` share of the steps."""
    start = max(options.warmup, steps - max(1, round(options.decay * steps)))
    return lambda step: 1 - (1 - options.floor) * _way(step, start, steps)


@SCHEDULES.register("inverse_sqrt", options=InverseSqrtOptions)
def inverse_sqrt(options: InverseSqrtOptions, steps: int) -> Factor:
    """sqrt(warmup / (step + 1)), with a warm-up of 0 counted as 1."""
    return lambda step: math.sqrt(max(options.warmup, 1) / max(step + 1, options.warmup, 1))


@SCHEDULES.register("constant", options=ConstantOptions)
def constant(options: ConstantOptions, steps: int) -> Factor:
    """1 at every step."""
    return lambda step: 1.0


def redrawn(config: Config, saved: pathlib.Path, done: int) -> list[str]:
    """A sentence when the schedule was drawn for another number of steps, so that the learning rate
    jumps at the step after `done`; `saved` is the config of the checkpoint that a run resumes."""
    held = strict_yaml.read_mapping(saved).get("train", {}) if saved.is_file() else {}
    before, now = held.get("steps"), config.train.steps
    if not before or done >= now:
        return []
    old = build_schedule(config.schedule, before)(min(done, before - 1))
    new = build_schedule(config.schedule, now)(done)
    if math.isclose(old, new, rel_tol=1e-3):
        return []
    return [
        f"train.steps was {before} and is {now}: schedule.name={config.schedule.name} is drawn "
        f"anew over them, and the learning rate goes from {old:.3g} to {new:.3g} of its peak at "
        f"step {done + 1}"
    ]
