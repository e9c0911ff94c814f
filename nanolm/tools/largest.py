"""How large a model may become: the limit of each strategy, since there is no tensor parallelism.

A config's model grows in width and depth together, its shape kept: s times the heads, the width
and the blocks, the same width of a head. The largest one whose `estimate` leaves a tenth of the
device free is found by bisection, for one row per GPU and full recomputation: what is left to turn
before weights would have to be divided within a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction

from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.tools.estimate import Sizes, estimate

SizesOf = Callable[[ModelConfig], Sizes]
"""Sizes of a model of two blocks."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """The largest model of one strategy."""

    strategy: str
    gpus: int
    parameters: int
    model: ModelConfig


def scaled(model: ModelConfig, groups: int) -> ModelConfig:
    """The model with so many groups of query heads (one key/value head each), all else alike."""
    scale = Fraction(groups, model.kv_heads)
    heads = groups * (model.n_heads // model.kv_heads)
    return dataclasses.replace(
        model,
        n_heads=heads,
        n_kv_heads=model.n_kv_heads and groups,
        d_model=int(model.d_model * scale),
        d_ff=model.d_ff and int(model.d_ff * scale),
        n_layers=max(1, round(model.n_layers * scale)),
    )


def largest(
    config: Config, sizes_of: SizesOf, strategies: Sequence[tuple[str, int]], device: str
) -> list[Limit]:
    """The limit of each (strategy, number of GPUs); `sizes_of` is asked a few dozen times."""
    known: dict[int, tuple[ModelConfig, Sizes]] = {}

    def at(groups: int) -> tuple[ModelConfig, Sizes]:
        if groups not in known:
            model = scaled(config.model, groups)
            small = sizes_of(dataclasses.replace(model, n_layers=2))
            known[groups] = model, small.deeper(model.n_layers)
        return known[groups]

    def fits(groups: int, strategy: str, gpus: int) -> bool:
        model, sizes = at(groups)
        return estimate(lean(config, model, strategy, gpus), sizes, gpus, device).fits

    found = []
    for strategy, gpus in strategies:
        low, high = 0, 1
        while fits(high, strategy, gpus):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, strategy, gpus) else (low, middle)
        if low:
            model, sizes = at(low)
            found.append(Limit(strategy, gpus, sizes.total, model))
    return found


def lean(config: Config, model: ModelConfig, strategy: str, gpus: int) -> Config:
    """The config with this model, one row per GPU and full recomputation."""
    train = dataclasses.replace(
        config.train, global_batch=gpus, micro_batch=1, activation_checkpointing="full"
    )
    distributed = dataclasses.replace(
        config.distributed, strategy=strategy, compare_weights_every=0, cpu_offload=False
    )
    return dataclasses.replace(config, model=model, train=train, distributed=distributed)
