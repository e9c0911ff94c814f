"""Five attention kernels that are nearly right, and by how much `kernels check` sees it.

    python -m tests.kernel_tools.imprecise

A trial allows an error (`Trial.size`), which right kernels use a part of. These measure it from the
other side: each is FlashAttention's arithmetic with one step as a person in a hurry writes it, and
the table says how many times what is allowed it is off. `RIGHT` has no such step: it stays below 1.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nanolm.tools.kernel_check.attention_cases import HARD, LARGE, MIXED, SINGLE, Case
from nanolm.tools.kernel_check.attention_trials import trial_of
from nanolm.tools.kernel_check.trial import excess, execute

HALF = (torch.float16, torch.bfloat16)
TILE = 64
CASES = SINGLE | MIXED | HARD | LARGE


def products(q_BHTK: Tensor, k_BHSK: Tensor, dtype: torch.dtype) -> Tensor:
    """q k^T, float32."""
    return q_BHTK @ k_BHSK.mT


def products_summed_in_bfloat16(q_BHTK: Tensor, k_BHSK: Tensor, dtype: torch.dtype) -> Tensor:
    """For 16-bit inputs the running sum is rounded after every four features."""
    if dtype not in HALF:
        return products(q_BHTK, k_BHSK, dtype)
    total = torch.zeros((), dtype=torch.bfloat16)
    for q, k in zip(q_BHTK.split(4, dim=-1), k_BHSK.split(4, dim=-1), strict=True):
        total = (total.float() + q @ k.mT).bfloat16()
    return total.float()


def lse_in_bfloat16(lse_BHT: Tensor, dtype: torch.dtype) -> Tensor:
    """What a 16-bit forward pass keeps for the backward one is rounded."""
    return lse_BHT.bfloat16().float() if dtype in HALF else lse_BHT


def one_too_far_in_the_second_tile(allowed_BHTS: Tensor, causal: bool) -> Tensor:
    """A causal query whose key lies in the second tile of keys sees the next one too."""
    n_queries, n_keys = allowed_BHTS.shape[-2:]
    own = torch.arange(n_queries)[:, None] + n_keys - n_queries
    key = torch.arange(n_keys)
    return allowed_BHTS | (causal & (key == own + 1) & (key // TILE == 1))


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of attention that are written otherwise somewhere."""

    products: Callable[[Tensor, Tensor, torch.dtype], Tensor] = products
    allowed: Callable[[Tensor, bool], Tensor] = lambda allowed, causal: allowed
    peak: Callable[[Tensor], Tensor] = lambda scores: scores.amax(-1)
    kept: Callable[[Tensor, torch.dtype], Tensor] = lambda lse, dtype: lse
    query_scale: Callable[[float], float] = lambda scale: scale


class Attention(torch.autograd.Function):
    """Both passes in float32, the backward one from the kept log-sum-exp (kernels_attention.md)."""

    @staticmethod
    def forward(ctx, steps, q, k, v, allowed, scale):
        dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
        scores = torch.where(allowed, steps.products(q, k, dtype) * scale, -torch.inf)
        peak = steps.peak(scores)
        peak = torch.where(peak.isfinite(), peak, 0.0)
        weights = (scores - peak[..., None]).exp()
        total = weights.sum(-1)
        out = weights @ v / torch.where(total > 0, total, 1.0)[..., None]
        ctx.save_for_backward(q, k, v, scores, out, steps.kept(peak + total.log(), dtype))
        ctx.steps, ctx.scale, ctx.dtype = steps, scale, dtype
        return out.to(dtype)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, scores, out, lse = ctx.saved_tensors
        grad = grad.float()
        weights = torch.where(scores > -torch.inf, (scores - lse[..., None]).exp(), 0.0)
        change = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
        grads = (
            ctx.steps.query_scale(ctx.scale) * change @ k,
            ctx.scale * change.mT @ q,
            weights.mT @ grad,
        )
        return None, *(x.to(ctx.dtype) for x in grads), None, None


class Imprecise:
    """The kernel of some steps."""

    name = "imprecise"

    def __init__(self, **steps: Any) -> None:
        self.steps = Steps(**steps)

    def why_not(self, spec: Any) -> str | None:
        if spec.bias or spec.softcap or spec.dropout or spec.dtype == torch.float64:
            return "it has no bias, no soft-cap, no dropout and no float64"
        return None

    def run(self, q, k, v, mask, *, scale, **nothing):
        repeats = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        allowed = self.steps.allowed(mask.dense(q.shape[2], k.shape[2]), mask.causal)
        with torch.autocast(q.device.type, enabled=False):  # its float32 products stay float32
            return Attention.apply(self.steps, q, k, v, allowed, scale).transpose(1, 2)


RIGHT = Imprecise()
IMPRECISE = {
    "scores of 16-bit inputs summed in bfloat16": Imprecise(products=products_summed_in_bfloat16),
    "softmax without its maximum": Imprecise(peak=lambda scores: scores.amax(-1) * 0),
    "mask one too far, second tile of 64 keys": Imprecise(allowed=one_too_far_in_the_second_tile),
    "log-sum-exp of 16-bit inputs kept in bfloat16": Imprecise(kept=lse_in_bfloat16),
    "dq without 1 / sqrt(K)": Imprecise(query_scale=lambda scale: 1.0),
}


def measured(kernel: Imprecise, case: Case) -> float | None:
    """The largest error of a kernel on a case, as a multiple of what is allowed; inf for what is
    not finite, None for what it does not serve."""
    trial = trial_of(case)
    if kernel.why_not(trial.spec):
        return None
    off = excess(trial, execute(trial, kernel, backward=True)).values()
    return max(math.inf if math.isnan(x) else x for x in off)


def table() -> Iterator[str]:
    """A row a kernel: in how many trials it fails, and where by most."""
    yield "| step | fails in | by most | there | large scores | the same in bfloat16 |"
    yield "|---|---|---|---|---|---|"
    for name, kernel in {"none, so it is right": RIGHT, **IMPRECISE}.items():
        found = {word: measured(kernel, case) for word, case in CASES.items()}
        served = {word: share for word, share in found.items() if share is not None}
        worst = max(served, key=served.__getitem__)
        fails = sum(not share < 1 for share in served.values())
        large = (served[word] for word in ("large scores", "large scores in bfloat16"))
        shares = [f"{share:.3g}" for share in (served[worst], *large)]
        shares.insert(1, worst)
        yield f"| {name} | {fails} of {len(served)} | {' | '.join(shares)} |"


def main() -> None:
    """Print the table."""
    print("\n".join(table()))


if __name__ == "__main__":
    main()
