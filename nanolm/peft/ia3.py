"""(IA)^3: learned vectors rescale keys, values and the feed-forward's inside (Liu et al. 2022).

    k = l_k * (W_k x)      v = l_v * (W_v x)      y = W_2 (l_ff * act(W_1 x))        section 3.3

The vectors start at one, and fold into the weights without a trace.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from nanolm.learner import Adapter, Learner
from nanolm.peft.base import Adopted, PeftOptions, linears
from nanolm.registry import PEFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3Options(PeftOptions):
    """Rescaling of keys, values and feed-forward activations."""

    name: str = "ia3"


class ScaledRows(Adopted):
    """A Linear whose outputs of some parts are scaled."""

    def __init__(self, base: nn.Linear, parts: dict[str, int], chosen: list[str]) -> None:
        super().__init__(base)
        self.parts = parts
        self.ia3 = nn.ParameterDict({name: torch.ones(parts[name]) for name in chosen})

    def scale(self) -> Tensor:
        """One factor per output row."""
        factors = [
            self.ia3[name] if name in self.ia3 else self.weight.new_ones(rows)
            for name, rows in self.parts.items()
        ]
        return torch.cat(factors)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        y = super().forward(x)
        return y * self.scale().to(y.dtype)

    def merged(self) -> nn.Linear:
        """The plain Linear with scaled rows."""
        scale = self.scale()
        bias = None if self.bias is None else self.bias * scale
        return self.fold(self.weight * scale[:, None], bias)


class ScaledColumns(Adopted):
    """A Linear whose inputs are scaled."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.ia3 = nn.Parameter(torch.ones(base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        return super().forward(x * self.ia3.to(x.dtype))

    def merged(self) -> nn.Linear:
        """The plain Linear with scaled columns."""
        return self.fold(self.weight * self.ia3)


@PEFT.register("ia3", options=Ia3Options)
def ia3(options: Ia3Options, learner: Learner, adapter: Adapter) -> None:
    """Vectors for keys, values and the input of the feed-forward's last Linear."""
    for parent, name, parts, chosen in linears(learner, ["k", "v"]):
        adapter.replace(parent, name, ScaledRows(getattr(parent, name), parts, chosen))
    for block in learner.trunk.blocks:
        forward: Any = block.feed_forward
        adapter.replace(forward, "down", ScaledColumns(forward.down))
