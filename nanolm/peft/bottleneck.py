"""Bottleneck adapters behind the sub-layers (Houlsby et al. 2019; Pfeiffer et al. 2021).

    y + U act(D y)         D [width, d_model], U [d_model, width] zero at first

y is what a sub-layer is about to add to the residual stream. Houlsby: behind attention and
feed-forward, with the norms trained too (section 2.1); Pfeiffer: behind the feed-forward alone.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.errors import require
from nanolm.learner import Adapter, Learner
from nanolm.model.layers import Norm
from nanolm.peft.base import Adopted, PeftOptions
from nanolm.registry import PEFT

BEHIND = {
    "houlsby": (("attention", "out"), ("feed_forward", "down")),
    "pfeiffer": (("feed_forward", "down"),),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckOptions(PeftOptions):
    """Small feed-forward networks between the layers."""

    name: str = "adapter"
    places: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: behind attention and feed-forward; pfeiffer: behind the feed-forward alone."""
    width: int = 16
    """Hidden width of an adapter."""
    norms: bool | None = None
    """Whether the trunk's norms are trained too; null means as in the paper: with houlsby."""

    def __post_init__(self) -> None:
        require(self.width >= 1, f"peft.width={self.width} must be at least 1")


class BottleneckLinear(Adopted):
    """A Linear with an adapter behind it."""

    def __init__(self, base: nn.Linear, width: int) -> None:
        super().__init__(base)
        self.shrink = nn.Linear(base.out_features, width)
        self.grow = nn.Linear(width, base.out_features)
        nn.init.normal_(self.shrink.weight, std=0.02)
        nn.init.zeros_(self.shrink.bias)
        nn.init.zeros_(self.grow.weight)
        nn.init.zeros_(self.grow.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        y = super().forward(x)
        return y + self.grow(F.gelu(self.shrink(y)))


@PEFT.register("adapter", options=BottleneckOptions)
def bottleneck(options: BottleneckOptions, learner: Learner, adapter: Adapter) -> None:
    """A BottleneckLinear for the last Linear of each chosen sub-layer."""
    for block in learner.trunk.blocks:
        for sublayer, name in BEHIND[options.places]:
            parent = getattr(block, sublayer)
            adapter.replace(parent, name, BottleneckLinear(getattr(parent, name), options.width))
    if options.norms if options.norms is not None else options.places == "houlsby":
        for module in learner.trunk.modules():
            if isinstance(module, Norm):
                adapter.train(module.parameters())
