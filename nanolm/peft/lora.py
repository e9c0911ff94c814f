"""LoRA: a low-rank change beside each chosen weight (Hu et al. 2022, section 4).

    y = W x + (alpha / r) B A x        A [r, n_in] random, B [n_out, r] zero, W frozen

Queries, keys and values lie in one weight here, so each of them has an A and B of its own for its
rows; the target `qkv` gives all three one A.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.errors import require
from nanolm.learner import Adapter, Learner
from nanolm.peft.base import Adopted, PeftOptions, linears
from nanolm.registry import PEFT

Target = Literal["q", "k", "v", "qkv", "out", "gate", "up", "gate_up", "down"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankOptions(PeftOptions):
    """Options of the methods with low-rank matrices."""

    rank: int = 8
    """Rank r of each change."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank path."""
    targets: list[Target] = dataclasses.field(default_factory=lambda: ["q", "v"])
    """Which weights of the blocks are changed: parts (q, k, v, out, gate, up, down) or whole fused
    weights (qkv, gate_up). Cross-attention is left as it is."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"peft.rank={self.rank} must be at least 1")
        require(0 <= self.dropout < 1, f"peft.dropout={self.dropout} must lie in [0, 1)")
        require(len(self.targets) > 0, "peft.targets is empty; use [q, v]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions(LowRankOptions):
    """Low-rank adaptation."""

    name: str = "lora"


class LowRank(nn.Module):
    """(alpha / r) B A dropout(x)."""

    def __init__(self, n_in: int, n_out: int, options: LowRankOptions) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(options.rank, n_in))
        self.b = nn.Parameter(torch.zeros(n_out, options.rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = options.alpha / options.rank
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        return F.linear(F.linear(self.dropout(x), self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """The change of the weight, [n_out, n_in]."""
        return self.scale * self.b @ self.a


class LoraLinear(Adopted):
    """A Linear whose rows fall into parts, some of which have a low-rank change."""

    low_rank: type[Any] = LowRank

    def __init__(
        self,
        base: nn.Linear,
        parts: dict[str, int],
        chosen: list[str],
        options: LowRankOptions,
    ) -> None:
        super().__init__(base)
        self.parts = parts
        self.lora: Any = nn.ModuleDict(
            {name: self.low_rank(base.in_features, parts[name], options) for name in chosen}
        )

    def split(self, rows: Tensor | None, dim: int) -> list[Any]:
        """A tensor's pieces along the output rows, one for each part; of None, as many None."""
        if rows is None:
            return [None] * len(self.parts)
        return list(rows.split(list(self.parts.values()), dim=dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        pieces = zip(self.parts, self.split(super().forward(x), -1), strict=True)
        changed = [y + self.lora[name](x) if name in self.lora else y for name, y in pieces]
        return changed[0] if len(changed) == 1 else torch.cat(changed, dim=-1)

    def merged(self) -> nn.Linear:
        """The plain Linear with the changes added to its weight."""
        pieces = zip(self.parts, self.split(self.weight, 0), strict=True)
        return self.fold(
            torch.cat([w + self.lora[n].delta() if n in self.lora else w for n, w in pieces])
        )


@PEFT.register("lora", options=LoraOptions)
def lora(options: LoraOptions, learner: Learner, adapter: Adapter) -> None:
    """A LoraLinear for every target."""
    for parent, name, parts, chosen in linears(learner, options.targets):
        adapter.replace(parent, name, LoraLinear(getattr(parent, name), parts, chosen, options))
