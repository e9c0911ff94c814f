"""AdaLoRA: low-rank changes in the form of an SVD share one budget of ranks (Zhang et al. 2023).

    y = W x + (alpha / r) B diag(e) A x          e starts at 0; A, B random and kept orthogonal

Each triplet (column of B, entry of e, row of A) has a score: the product of the smoothed |w dL/dw|
and of its smoothed change, e's own plus the means over the column and the row (section 3.2). From
`warm_steps` on, a falling number of triplets keeps its e and all others' become 0, chosen over all
weights together; the number falls along a cubic curve (section 3.3). The loss gains weight *
mean ||A A^T - I||, as in the authors' code; the paper squares the norm (section 3.1).

Scores live in buffers, so a resumed run goes on with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolm.errors import require
from nanolm.learner import Adapter, Learner
from nanolm.peft.base import linears
from nanolm.peft.lora import LoraLinear, LowRankOptions
from nanolm.registry import PEFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraOptions(LowRankOptions):
    """Low-rank adaptation with a budget of ranks."""

    name: str = "adalora"
    rank: int = 12
    """Rank of each change at first."""
    target_rank: int = 8
    """Mean rank of the changes in the end."""
    warm_steps: int = 0
    """Steps before the first rank is taken away."""
    final_steps: int = 0
    """Steps at the end during which the choice of ranks stays."""
    every: int = 1
    """Steps between two choices."""
    betas: tuple[float, float] = (0.85, 0.85)
    """Smoothing of a weight's importance, and of its change."""
    orthogonality: float = 0.5
    """Weight of the term that keeps A's rows and B's columns orthonormal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.target_rank <= self.rank,
            f"peft.target_rank={self.target_rank} must lie between 1 and peft.rank={self.rank}",
        )
        require(
            min(self.warm_steps, self.final_steps) >= 0 and self.every >= 1,
            "peft.warm_steps and peft.final_steps must not be negative, peft.every at least 1",
        )
        require(
            all(0 < beta < 1 for beta in self.betas), f"peft.betas={self.betas} must lie in (0, 1)"
        )


def gradient_of(weight: nn.Parameter) -> Tensor:
    """The gradient that a step has given it: a trained weight has one in every step."""
    return cast(Tensor, weight.grad)


class Triplets(nn.Module):
    """(alpha / r) B diag(e) A dropout(x), and how important each part of it has been."""

    a_importance: Tensor
    a_change: Tensor
    e_importance: Tensor
    e_change: Tensor
    b_importance: Tensor
    b_change: Tensor

    def __init__(self, n_in: int, n_out: int, options: AdaLoraOptions) -> None:
        super().__init__()
        rank = options.rank
        self.a = nn.Parameter(0.02 * torch.randn(rank, n_in))
        self.e = nn.Parameter(torch.zeros(rank, 1))
        self.b = nn.Parameter(0.02 * torch.randn(n_out, rank))
        self.scale = options.alpha / (rank + 1e-5)
        self.betas = options.betas
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()
        for name, weight in self.named_parameters():
            self.register_buffer(f"{name}_importance", torch.zeros_like(weight))
            self.register_buffer(f"{name}_change", torch.zeros_like(weight))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        return F.linear(F.linear(self.dropout(x), self.a * self.e), self.b) * self.scale

    def delta(self) -> Tensor:
        """The change of the weight, [n_out, n_in]."""
        return self.scale * self.b @ (self.a * self.e)

    @torch.no_grad()
    def observe(self) -> None:
        """Smooths |w dL/dw| and its change, with the gradients of the step just taken."""
        first, second = self.betas
        for name, weight in self.named_parameters():
            importance = getattr(self, f"{name}_importance")
            change = getattr(self, f"{name}_change")
            now = (weight * gradient_of(weight)).abs()
            importance.lerp_(now, 1 - first)
            change.lerp_((now - importance).abs(), 1 - second)

    def scores(self) -> Tensor:
        """One number per triplet, [rank]."""
        a = (self.a_importance * self.a_change).mean(dim=1)
        b = (self.b_importance * self.b_change).mean(dim=0)
        return (self.e_importance * self.e_change)[:, 0] + a + b

    def disorder(self) -> Tensor:
        """||A A^T - I|| + ||B^T B - I||, a scalar."""
        identity = torch.eye(len(self.a), device=self.a.device, dtype=self.a.dtype)
        return (self.a @ self.a.T - identity).norm() + (self.b.T @ self.b - identity).norm()


class AdaLoraLinear(LoraLinear):
    """A LoraLinear with triplets instead of pairs."""

    low_rank = Triplets


class Budget(nn.Module):
    """Hands out ranks between the steps of the optimizer."""

    step: Tensor

    def __init__(self, options: AdaLoraOptions, triplets: list[Triplets]) -> None:
        super().__init__()
        self.options = options
        self.triplets = tuple(triplets)  # a tuple: they are children of their Linears, not of this
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.n_steps = 0

    def watch(self, optimizers: Sequence[torch.optim.Optimizer], n_steps: int) -> None:
        """Acts before and after every step of these optimizers, of which there are n_steps."""
        options = self.options
        require(
            options.warm_steps + options.final_steps < n_steps,
            f"peft.warm_steps={options.warm_steps} and peft.final_steps={options.final_steps} "
            f"leave nothing of train.steps={n_steps} in which to choose ranks",
        )
        self.n_steps = n_steps
        optimizers[0].register_step_pre_hook(lambda *_: self.before_step())
        optimizers[-1].register_step_post_hook(lambda *_: self.after_step())

    def before_step(self) -> None:
        """Adds the gradient of the orthogonality term; it is the same on every rank."""
        weights = [p for t in self.triplets for p in (t.a, t.b)]
        disorder = torch.as_tensor(sum(t.disorder() for t in self.triplets)) / len(weights)
        for p, gradient in zip(weights, torch.autograd.grad(disorder, weights), strict=True):
            gradient_of(p).add_(gradient, alpha=self.options.orthogonality)

    @torch.no_grad()
    def after_step(self) -> None:
        """Observes the step, and where one is due chooses the triplets that keep their e."""
        self.step += 1
        # The host waits here, for the optimizer's kernels: the number of triplets that are kept
        # follows from the step, which a checkpoint or a rewind may have changed on the device.
        step, options = int(self.step), self.options
        if step < self.n_steps - options.final_steps:
            for t in self.triplets:
                t.observe()
        last = step >= self.n_steps - options.final_steps
        if last or (step > options.warm_steps and step % options.every == 0):
            self.prune(self.size(step))

    def size(self, step: int) -> int:
        """Triplets that are left after a step: a cubic fall from all to the target."""
        options = self.options
        first, final = (len(self.triplets) * r for r in (options.rank, options.target_rank))
        span = self.n_steps - options.final_steps - options.warm_steps
        left = min(1.0, max(0.0, 1 - (step - options.warm_steps) / span))
        return int((first - final) * left**3 + final)

    def prune(self, size: int) -> None:
        """Sets e of all but the `size` best triplets to zero."""
        scores = [t.scores() for t in self.triplets]
        every = torch.cat(scores)
        if size >= len(every):
            return
        threshold = torch.kthvalue(every, len(every) - size).values
        for t, score in zip(self.triplets, scores, strict=True):
            t.e.masked_fill_((score <= threshold)[:, None], 0.0)

    def extra_repr(self) -> str:
        """The budget at present, for `print(model)`."""
        return f"step={int(self.step)}, triplets={len(self.triplets)}"


@PEFT.register("adalora", options=AdaLoraOptions)
def adalora(options: AdaLoraOptions, learner: Learner, adapter: Adapter) -> None:
    """An AdaLoraLinear for every target, and the budget that they share."""
    triplets: list[Any] = []
    for parent, name, parts, chosen in linears(learner, options.targets):
        linear = AdaLoraLinear(getattr(parent, name), parts, chosen, options)
        adapter.replace(parent, name, linear)
        triplets += linear.lora.values()
    budget = Budget(options, triplets)
    adapter.add(learner.trunk, "budget", budget)
    adapter.watch = budget.watch
