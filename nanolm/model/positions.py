"""Position encodings, all behind the same hooks with identity defaults.

    embed(x, positions)      added to the token embeddings      learned, sinusoidal
    prepare(positions)       computed once per forward pass     rotary's cos and sin
    of_layer(prepared, l)    what block l needs of that         rotary's table of the block's base
    rotate(q, k, prepared)   applied to queries and keys        rotary
    bias()                   added to attention scores          ALiBi, T5

A block calls all of them and never asks which encoding it has.

Shapes: B batch, T tokens, D model width, H heads, G key/value heads, K head width, R rotated pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.config.ranges import Count
from nanolm.errors import require
from nanolm.ops.bias import AlibiBias, Bias, BucketBias
from nanolm.ops.contract import Kernels, RotarySpec
from nanolm.registry import POSITIONS, Options


class Positions(nn.Module):
    """The identity on every hook: no position encoding at all."""

    bias_kind: str | None = None

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings with positions, before the first block."""
        return x_BTD

    def prepare(self, positions_BT: Tensor) -> Any:
        """Whatever `rotate` needs of the positions; called once per forward pass."""
        return None

    def of_layer(self, prepared: Any, layer: int) -> Any:
        """What block `layer` needs of what `prepare` returned: `rotate` gets this. The stack calls
        it outside of the blocks, so that blocks which compute the same are compiled once."""
        return prepared

    def rotate(
        self, q_BTHK: Tensor, k_BTGK: Tensor, prepared: Any, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys as the attention of block `layer` sees them, by what `of_layer` gave it.

        With train.compile, code that reads `layer` here is compiled anew for every block.
        """
        return q_BTHK, k_BTGK

    def bias(self) -> Bias | None:
        """The bias on attention scores, as intent."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPositionsOptions(Options):
    """No position encoding (Kazemnejad et al. 2023); only sensible for causal trunks."""

    name: str = "none"


@POSITIONS.register("none", options=NoPositionsOptions)
def no_positions(options: NoPositionsOptions, model: ModelConfig, kernels: Kernels) -> Positions:
    """The identity."""
    return Positions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedOptions(Options):
    """One learned vector per position (Devlin et al. 2019; Radford et al. 2019)."""

    name: str = "learned"


@POSITIONS.register("learned", options=LearnedOptions)
class Learned(Positions):
    """x + P[position]."""

    def __init__(self, options: LearnedOptions, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.table = nn.Embedding(model.max_length, model.d_model)

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x plus the learned vector of each position."""
        return x_BTD + self.table(positions_BT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinusoidalOptions(Options):
    """Fixed sines and cosines (Vaswani et al. 2017, section 3.5)."""

    name: str = "sinusoidal"
    base: float = 10000.0
    """Ratio between the longest and the shortest wavelength."""


@POSITIONS.register("sinusoidal", options=SinusoidalOptions)
class Sinusoidal(Positions):
    """x + S[position], S[p, 2i] = sin(p / base^(2i/D)), S[p, 2i+1] = cos of the same."""

    def __init__(self, options: SinusoidalOptions, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        require(model.d_model % 2 == 0, "model.positions=sinusoidal needs an even model.d_model")
        self.d_model, self.base = model.d_model, options.base

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x plus the sinusoids of each position."""
        frequency_i = inverse_frequencies(self.d_model, self.base, positions_BT.device)
        angle_BTi = positions_BT[..., None].float() * frequency_i
        # Both of each frequency: with the two, a shift by k positions is a rotation, a linear map
        # that is the same wherever it begins.
        table_BTD = torch.stack([angle_BTi.sin(), angle_BTi.cos()], dim=-1).flatten(-2)
        return x_BTD + table_BTD.to(x_BTD.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryOptions(Options):
    """Rotation of queries and keys by their position (Su et al. 2021)."""

    name: str = "rotary"
    base: list[float] = dataclasses.field(default_factory=lambda: [10000.0])
    """Base of the wavelengths by layer, repeated as a pattern like model.window."""
    fraction: float = 1.0
    """Share of each head's features that is rotated."""
    scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotations are slowed for texts longer than the first ones trained on: linear, all by the
    factor (Chen et al. 2023); llama3, only slow ones (Grattafiori et al. 2024)."""
    factor: float = 1.0
    """What scaled rotations are divided by."""
    original_length: Count = 8192
    """With llama3, the longest text before scaling, in tokens."""
    low_frequency: float = 1.0
    """With llama3, pairs that go round fewer times than this in original_length are slowed by the
    whole factor."""
    high_frequency: float = 4.0
    """With llama3, pairs that go round more often than this in original_length stay as they are."""

    def __post_init__(self) -> None:
        require(
            1.0 <= self.factor < math.inf,
            f"model.positions.factor={self.factor} must be at least 1",
        )
        require(
            self.scaling != "none" or self.factor == 1.0,
            f"model.positions.factor={self.factor} slows nothing while model.positions.scaling is "
            f"none; set that to linear or llama3, or leave the factor out",
        )
        require(
            0 < self.low_frequency < self.high_frequency < math.inf,
            f"model.positions.low_frequency={self.low_frequency} must lie between 0 and "
            f"model.positions.high_frequency={self.high_frequency}",
        )


@POSITIONS.register("rotary", options=RotaryOptions)
class Rotary(Positions):
    """q_t and k_t rotated by t: their product depends on the distance only."""

    def __init__(self, options: RotaryOptions, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.n_rotated = int(model.head_width * options.fraction)
        require(
            self.n_rotated > 0 and self.n_rotated % 2 == 0,
            f"model.positions=rotary rotates pairs: {self.n_rotated} features of a head cannot be "
            f"paired; change model.head_dim or model.positions.fraction",
        )
        require(len(options.base) > 0, "model.positions.base is empty; use [10000.0]")
        self.bases, self.options = options.base, options
        self.scaled = SCALINGS[options.scaling]
        self.kernel = kernels.choose("rotary", RotarySpec, head_dim=model.head_width)

    def prepare(self, positions_BT: Tensor) -> dict[float, tuple[Tensor, Tensor]]:
        """{base: (cos_BTR, sin_BTR)}, float32, for each base in the pattern."""
        tables = {}
        for base in dict.fromkeys(self.bases):
            # One speed for each pair: fast pairs tell neighbours apart, slow ones have not gone
            # round once by the end of a long text. In float32, since bfloat16 has no odd numbers
            # above 256.
            plain_R = inverse_frequencies(self.n_rotated, base, positions_BT.device)
            frequency_R = self.scaled(plain_R, self.options)
            angle_BTR = positions_BT[..., None].float() * frequency_R
            tables[base] = (angle_BTR.cos(), angle_BTR.sin())
        return tables

    def of_layer(
        self, prepared: dict[float, tuple[Tensor, Tensor]], layer: int
    ) -> tuple[Tensor, Tensor]:
        """(cos_BTR, sin_BTR) of the block's base."""
        return prepared[self.bases[layer % len(self.bases)]]

    def rotate(
        self, q_BTHK: Tensor, k_BTGK: Tensor, prepared: tuple[Tensor, Tensor], layer: int
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys."""
        cos_BTR, sin_BTR = prepared
        # Queries and keys, not values: where a token stands says how well it matches, not what is
        # read of it.
        return self.kernel.run(q_BTHK, cos_BTR, sin_BTR), self.kernel.run(k_BTGK, cos_BTR, sin_BTR)


def unscaled(frequency_R: Tensor, options: RotaryOptions) -> Tensor:
    """As they are."""
    return frequency_R


def scaled_linearly(frequency_R: Tensor, options: RotaryOptions) -> Tensor:
    """All divided by the factor: position p stands where p / factor stood (Chen et al. 2023)."""
    return frequency_R / options.factor


def scaled_by_turns(frequency_R: Tensor, options: RotaryOptions) -> Tensor:
    """As the code of Llama 3.1 does (the models: Grattafiori et al. 2024): a pair is slowed by the
    less, the more often it goes round in a text of the original length."""
    # What went round often has been seen at every angle, and tells neighbours apart; only the
    # angles of slow pairs would be new in a longer text.
    turns_R = options.original_length * frequency_R / (2 * math.pi)
    kept_R = (turns_R - options.low_frequency) / (options.high_frequency - options.low_frequency)
    kept_R = kept_R.clamp(0, 1)
    return kept_R * frequency_R + (1 - kept_R) * frequency_R / options.factor


SCALINGS: dict[str, Callable[[Tensor, RotaryOptions], Tensor]] = {
    "none": unscaled,
    "linear": scaled_linearly,
    "llama3": scaled_by_turns,
}
"""What positions.scaling names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlibiOptions(Options):
    """A penalty linear in the distance (Press et al. 2022)."""

    name: str = "alibi"


@POSITIONS.register("alibi", options=AlibiOptions)
class Alibi(Positions):
    """score - slope_h * distance; symmetric in the distance for encoders."""

    bias_kind = "alibi"
    slopes_H: Tensor

    def __init__(self, options: AlibiOptions, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        slopes = torch.tensor(alibi_slopes(model.n_heads))
        self.register_buffer("slopes_H", slopes, persistent=False)

    def bias(self) -> AlibiBias:
        """The slopes of all heads."""
        return AlibiBias(self.slopes_H)


def alibi_slopes(n_heads: int) -> list[float]:
    """2^(-8 i / n) for i = 1..n; other head counts interleave the next power of two's slopes."""
    # A geometric sequence down to 2^-8: some heads see little but what is near, others nearly all.
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return slopes + between


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5BiasOptions(Options):
    """A learned bias per head and distance bucket (Raffel et al. 2020, section 2.1)."""

    name: str = "t5"
    n_buckets: int = 32
    """Number of distance buckets."""
    max_distance: int = 128
    """Distances from here on share the last bucket."""


@POSITIONS.register("t5", options=T5BiasOptions)
class T5Bias(Positions):
    """score + b_h[bucket(distance)], one table for all blocks of a stack; an encoder's buckets tell
    before from after."""

    bias_kind = "bucket"

    def __init__(self, options: T5BiasOptions, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        # Halved twice: into before and after (in an encoder), and into near distances, which have a
        # bucket each, and far ones, which share.
        require(
            options.n_buckets >= 4 and options.n_buckets % 4 == 0,
            f"model.positions.n_buckets={options.n_buckets} must be a multiple of 4",
        )
        require(
            options.max_distance > options.n_buckets // 2,
            f"model.positions.max_distance={options.max_distance} must exceed n_buckets / 2",
        )
        self.table = nn.Embedding(options.n_buckets, model.n_heads)
        self.bidirectional = model.trunk == "encoder"
        self.max_distance = options.max_distance

    def bias(self) -> BucketBias:
        """The learned table with the rule that finds buckets."""
        return BucketBias(self.table.weight, self.bidirectional, self.max_distance)


def inverse_frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """float32 [width / 2]: base^(-2i / width)."""
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    return base**-exponent
