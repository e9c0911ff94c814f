"""From logits to the next token: pure functions, applied in this order.

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

Temperature 0 is greedy. Each sequence draws from its own generator, so what it says does not depend
on what else is in the batch.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nanolm.config.ranges import Count
from nanolm.errors import require

SMALLEST = 1e-6
"""What logits are divided by at least: float32 would overflow below, long after it is greedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: Count | None = None
    """Keep only this many most likely tokens."""
    top_p: float | None = 0.95
    """Keep the smallest set of tokens whose probabilities reach this sum (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Keep tokens at least this likely, relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens already seen (Keskar et al. 2019, who
    divide negative ones too: that would make them likelier)."""

    def __post_init__(self) -> None:
        require(
            self.temperature == 0 or self.temperature >= SMALLEST,
            f"temperature={self.temperature} must be at least {SMALLEST}, or 0 for the most likely "
            f"token",
        )
        require(self.top_k is None or self.top_k > 0, f"top_k={self.top_k} must be positive")
        for key in ("top_p", "min_p"):
            value = getattr(self, key)
            require(value is None or 0 < value <= 1, f"{key}={value} must lie in (0, 1]")
        require(
            SMALLEST <= self.repetition_penalty <= 1 / SMALLEST,
            f"repetition_penalty={self.repetition_penalty} must lie in [{SMALLEST}, "
            f"{1 / SMALLEST:g}]; 1 changes nothing",
        )


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits with those of the tokens that are True in seen_BV made less likely."""
    penalised = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalised, logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest logits of each row (ties with the k-th stay)."""
    kth_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf outside the nucleus: the most likely tokens up to a probability of p, at least one."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probability_BV = sorted_BV.softmax(dim=-1)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    outside_BV = torch.zeros_like(before_BV, dtype=torch.bool)
    outside_BV.scatter_(-1, order_BV, before_BV >= p)
    return logits_BV.masked_fill(outside_BV, -torch.inf)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf for tokens whose probability is below p times the largest."""
    probability_BV = logits_BV.softmax(dim=-1)
    floor_B1 = p * probability_BV.max(dim=-1, keepdim=True).values
    return logits_BV.masked_fill(probability_BV < floor_B1, -torch.inf)


def draw(
    logits_BV: Tensor, seen_BV: Tensor, sampling: Sampling, generators: list[torch.Generator]
) -> Tensor:
    """The next token of each sequence, int64 [B]."""
    logits_BV = logits_BV.float()
    if sampling.repetition_penalty != 1.0:
        logits_BV = penalise_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    probability_BV = logits_BV.softmax(dim=-1)
    rows = zip(probability_BV, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in rows])
