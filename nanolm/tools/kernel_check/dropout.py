"""Dropout of an attention kernel, whatever draws its random numbers.

which     scores of 0 and one-hot values show every weight by itself: as many as `dropout` says are
          0, the others 1 / (1 - dropout) times what they were, and nothing repeats from head to
          head, row to row or tile to tile
what      values that are the same for every key make the output the sum of the kept weights:
          its mean is 1
when      torch.manual_seed repeats it, without gradients too, as activation checkpointing calls
          it; two calls in a row differ
gradient  for one seed the output is a smooth function of q, k and v, so the derivative along a
          direction is the difference of two outputs; another mask in the backward pass shows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanolm.ops.masks import Mask

RATE, OTHER_RATE = 0.25, 0.1
SHAPE = (4, 64, 2)  # [B, T, H]: 32,768 weights
SEED = 1234
LENGTH = 146
"""Queries and keys of the weights that are looked at one by one: more than a tile of 128."""
WINDOWS = (0, 128)
"""The first of so many keys whose weights are looked at."""
LOOKED_AT = 16
"""Keys of a window: no more than a head is wide."""


def dropout_fault(
    kernel: Any, device: str, dtype: torch.dtype = torch.float32, width: int = LOOKED_AT
) -> str | None:
    """A sentence about the kernel's dropout in a dtype and heads of a width, or None when it is
    right."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, *directions = (
        torch.randn(*SHAPE, width, generator=generator).to(device, dtype) for _ in range(6)
    )
    zeros = torch.zeros(2, LENGTH, SHAPE[2], width, device=device, dtype=dtype)

    def run(*given: Tensor, seed: int | None = SEED, rate: float = RATE) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return kernel.run(*given, Mask(), scale=0.1, dropout=rate)

    with torch.random.fork_rng():
        words = drawn(run, q, k, v) or looked_at(weights(run, zeros, RATE), RATE)
        words = words or counted(weights(run, zeros[:, :64], OTHER_RATE), OTHER_RATE)
        if words is not None:
            return words
        if dtype == torch.float32:
            return differentiated(run, (q, k, v), directions)
        return kept_by_both(run, zeros)  # the difference of two outputs says nothing in 16 bits


def weights(run: Callable[..., Tensor], zeros: Tensor, rate: float) -> Tensor:
    """[B, H, T, 16 a window]: what is left of weights of 1, of a few keys by their places."""
    found = []
    for first in (first for first in WINDOWS if first < zeros.shape[1]):
        values = torch.zeros_like(zeros)
        one_hot = torch.eye(LOOKED_AT, device=zeros.device)[:, None]
        values[:, first : first + LOOKED_AT, :, :LOOKED_AT] = one_hot
        out = run(zeros, zeros, values, rate=rate).detach().float()
        found.append(out[..., :LOOKED_AT])
    return torch.cat(found, dim=-1).transpose(1, 2) * zeros.shape[1]


def kept_by_both(run: Callable[..., Tensor], zeros: Tensor) -> str | None:
    """Whether values get gradients by the weights that the forward pass kept."""
    weights_BHTS = weights(run, zeros, RATE) / LENGTH
    values = torch.zeros_like(zeros).requires_grad_()
    out = run(zeros, zeros, values)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (grad,) = torch.autograd.grad(out, values, weight)
    right = (weights_BHTS.mT @ weight.float().transpose(1, 2)).transpose(1, 2)
    found = torch.cat([grad[:, first : first + LOOKED_AT] for first in WINDOWS], dim=1)
    if (found.float() - right).abs().max() < 0.03 * right.abs().max():
        return None
    return "with dropout its gradient of v is not that of its output"


def counted(weights_BHTS: Tensor, rate: float) -> str | None:
    """How many weights are dropped, and what becomes of the others."""
    dropped = weights_BHTS == 0
    share = float(dropped.double().mean())  # of 4,096 weights or more: its deviation is 0.005
    if abs(share - rate) > 0.025:
        return f"at a dropout of {rate} it drops {share:.1%} of the weights"
    left = weights_BHTS[~dropped] * (1 - rate)
    if (left - 1).abs().max() > 1e-2:  # 16 bits round 1 / 146, and the result
        return (
            f"its dropout changes the weights that it keeps otherwise than by 1 / (1 - dropout), "
            f"as if it divided by the sum of what is kept: by {float(left.min()):.2f} to "
            f"{float(left.max()):.2f} of that"
        )
    return None


def looked_at(weights_BHTS: Tensor, rate: float) -> str | None:
    """Which weights are dropped: any of them, whatever becomes of the others."""
    words = counted(weights_BHTS, rate)
    if words is not None:
        return words
    dropped, width = weights_BHTS == 0, LOOKED_AT
    for words, a, b in (
        ("in all heads", dropped[:, :1], dropped[:, 1:]),
        ("in all rows of the batch", dropped[:1], dropped[1:]),
        ("for all queries", dropped[:, :, :1], dropped[:, :, 1:]),
        ("for all keys", dropped[..., :1], dropped[..., 1:width]),
        *(
            (f"again {n} queries on", dropped[:, :, :-n], dropped[:, :, n:])
            for n in (1, 8, 16, 32, 64, 128)
        ),
        ("again 128 keys on", dropped[..., :width], dropped[..., width:]),
    ):
        alike = float((a == b).double().mean())
        # By chance; the fewest pairs are 2,304, so that its deviation is 0.01.
        expected = rate**2 + (1 - rate) ** 2
        if abs(alike - expected) > 0.12:
            return f"its dropout drops the same weights {words}: they must be drawn one by one"
    return None


def drawn(run: Any, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What is dropped, and when."""
    first, whole = run(q, k, v).detach(), run(q, k, v, rate=0.0).detach()
    if (first - whole).abs().max() < 1e-2:
        return "it ignores dropout: no weight is dropped"
    sums = run(q, k, torch.ones_like(v)).detach()[..., 0].float()
    off = float(sums.mean()) - 1  # its deviation is below 0.01
    if abs(off + RATE) < 0.04:
        return "what its dropout keeps is not scaled by 1 / (1 - dropout)"
    if abs(off) > 0.04:
        return f"dropout changes the mean of its output by {off:+.0%}; the mean must stay"
    if not torch.equal(first, run(q, k, v).detach()):
        return "torch.manual_seed does not repeat its dropout"
    if torch.equal(first, run(q, k, v, seed=None).detach()):
        return "two calls in a row drop the same weights: dropout must draw anew"
    with torch.no_grad():
        plain = run(q, k, v)
    trained = run(*(x.clone().requires_grad_() for x in (q, k, v))).detach()
    if (plain - trained).abs().max() > 5e-2:
        return (
            "after the same torch.manual_seed it drops other weights with gradients than without: "
            "activation checkpointing runs it both ways"
        )
    return None


def differentiated(run: Any, inputs: tuple[Tensor, ...], directions: list[Tensor]) -> str | None:
    """Whether the gradient is that of the weights which the forward pass kept."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(inputs[0].shape, generator=generator).to(inputs[0].device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    step = 1e-2
    for index, name in enumerate("qkv"):
        if grads[index] is None:
            return f"with dropout no gradient reaches {name}"
        # Towards the gradient too: in a random direction alone a wrong one may be right by chance.
        ahead = grads[index] * (directions[index].norm() / grads[index].norm())
        direction = directions[index] + ahead
        pair = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[index] = inputs[index] + sign * step * direction
            pair.append((run(*moved).detach().double() * weight).sum())
        slope = float(pair[0] - pair[1]) / (2 * step)
        along = float((grads[index].double() * direction).sum())
        size = float(grads[index].norm() * direction.norm()) / SHAPE[1] ** 0.5
        if abs(slope - along) > 0.02 * size:
            return f"with dropout its gradient of {name} is not that of its output"
    return None
