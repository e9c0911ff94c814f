"""Dropout of an attention kernel, whatever draws its random numbers.

what      values that are the same for every key make the output the sum of the kept weights:
          its mean is 1, and it is not 1 everywhere
when      torch.manual_seed repeats it; two calls in a row differ
gradient  for one seed the output is a smooth function of q, k and v, so the derivative along a
          direction is the difference of two outputs; another mask in the backward pass shows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanolm.ops.masks import Mask

RATE = 0.25
SHAPE = (4, 64, 2, 16)  # [B, T, H, K]: 32,768 weights
SEED = 1234


def dropout_fault(kernel: Any, device: str) -> str | None:
    """A sentence about the kernel's dropout, or None when it is right."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, *directions = (torch.randn(SHAPE, generator=generator).to(device) for _ in range(6))

    def run(*given: Tensor, seed: int | None = SEED) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return kernel.run(*given, Mask(), scale=0.1, dropout=RATE)

    with torch.random.fork_rng():
        return drawn(run, q, k, v) or differentiated(run, (q, k, v), directions)


def drawn(run: Any, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What is dropped, and when."""
    sums = run(q, k, torch.ones_like(v)).detach()[..., 0]
    if (sums - 1).abs().max() < 1e-3:
        return "it ignores dropout: no weight is dropped"
    off = float(sums.mean()) - 1  # its deviation is below 0.01
    if abs(off + RATE) < 0.04:
        return "what its dropout keeps is not scaled by 1 / (1 - dropout)"
    if abs(off) > 0.04:
        return f"dropout changes the mean of its output by {off:+.0%}; the mean must stay"
    first = run(q, k, v).detach()
    if not torch.equal(first, run(q, k, v).detach()):
        return "torch.manual_seed does not repeat its dropout"
    if torch.equal(first, run(q, k, v, seed=None).detach()):
        return "two calls in a row drop the same weights: dropout must draw anew"
    return None


def differentiated(run: Any, inputs: tuple[Tensor, ...], directions: list[Tensor]) -> str | None:
    """Whether the gradient is that of the weights which the forward pass kept."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(inputs[0].device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    step = 1e-2
    for index, name in enumerate("qkv"):
        if grads[index] is None:
            return f"with dropout no gradient reaches {name}"
        pair = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[index] = inputs[index] + sign * step * directions[index]
            pair.append((run(*moved).detach().double() * weight).sum())
        slope = float(pair[0] - pair[1]) / (2 * step)
        along = float((grads[index].double() * directions[index]).sum())
        size = float(grads[index].norm() * directions[index].norm()) / SHAPE[1] ** 0.5
        if abs(slope - along) > 0.02 * size:
            return f"with dropout its gradient of {name} is not that of its output"
    return None
