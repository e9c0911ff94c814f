"""DoRA: LoRA for a weight's direction, a vector for its magnitude (Liu et al. 2024, section 4).

    V = W + (alpha / r) B A        W' = m V / ||V||        row by row; m starts as ||W||

W is [n_out, n_in], so there is one magnitude for each output feature, as in the authors' code; the
paper writes the norm over columns (section 4.1). The norm counts as a constant in the backward pass
(section 4.3), which saves memory and changes the result little.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from nanolm.learner import Adapter, Learner
from nanolm.peft.base import linears
from nanolm.peft.lora import LoraLinear, LowRankOptions
from nanolm.registry import PEFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoraOptions(LowRankOptions):
    """Weight-decomposed low-rank adaptation."""

    name: str = "dora"


class DoraLinear(LoraLinear):
    """A LoraLinear whose changed parts also have a trained magnitude per output row."""

    def __init__(
        self, base: nn.Linear, parts: dict[str, int], chosen: list[str], options: DoraOptions
    ) -> None:
        super().__init__(base, parts, chosen, options)
        weights = dict(zip(parts, self.split(base.weight.detach(), 0), strict=True))
        self.magnitude = nn.ParameterDict(
            {name: nn.Parameter(weights[name].norm(dim=1)) for name in chosen}
        )

    def direction(self, name: str, weight: Tensor) -> Tensor:
        """V of one part, [rows, n_in]."""
        return weight + self.lora[name].delta()

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]: m / ||V|| (W x + (alpha / r) B A x) + bias."""
        product = self.kernel.run(x, self.weight, None)
        pieces = zip(
            self.parts,
            self.split(product, -1),
            self.split(self.weight, 0),
            self.split(self.bias, 0),
            strict=True,
        )
        changed = []
        for name, y, weight, bias in pieces:
            if name in self.lora:
                with torch.no_grad():
                    norm = self.direction(name, weight).norm(dim=1)
                y = (y + self.lora[name](x)) * (self.magnitude[name] / norm).to(y.dtype)
            changed.append(y if bias is None else y + bias.to(y.dtype))
        return changed[0] if len(changed) == 1 else torch.cat(changed, dim=-1)

    def merged(self) -> nn.Linear:
        """The plain Linear with weight m V / ||V||."""
        weights = []
        for name, weight in zip(self.parts, self.split(self.weight, 0), strict=True):
            if name in self.lora:
                v = self.direction(name, weight)
                weight = v * (self.magnitude[name] / v.norm(dim=1))[:, None]
            weights.append(weight)
        return self.fold(torch.cat(weights))


@PEFT.register("dora", options=DoraOptions)
def dora(options: DoraOptions, learner: Learner, adapter: Adapter) -> None:
    """A DoraLinear for every target."""
    for parent, name, parts, chosen in linears(learner, options.targets):
        adapter.replace(parent, name, DoraLinear(getattr(parent, name), parts, chosen, options))
