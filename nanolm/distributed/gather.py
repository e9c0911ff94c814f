"""Vectors of all ranks, with gradient: for losses that couple rows over the whole global batch.

Rank r holds x_r; everyone gets [x_0; x_1; …]. In the backward pass every rank has a gradient for
all of them, and the gradient of x_r is the sum over ranks of their parts for it. Ranks may hold
different numbers of vectors, or none.

Shapes: N vectors of this rank, A vectors of all ranks, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor) -> tuple[Tensor, int]:
        size, rank = dist.get_world_size(), dist.get_rank()
        counts = [torch.zeros(1, dtype=torch.int64, device=x_ND.device) for _ in range(size)]
        dist.all_gather(counts, torch.full((1,), len(x_ND), device=x_ND.device))
        # The host waits here: it allocates what the other ranks send, and they alone know how much.
        sizes = torch.cat(counts).tolist()
        padded = x_ND.new_zeros(max(1, *sizes), x_ND.shape[1])
        padded[: len(x_ND)] = x_ND
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded)
        ctx.first, ctx.count = sum(sizes[:rank]), len(x_ND)
        all_AD = torch.cat([part[:count] for part, count in zip(parts, sizes, strict=True)])
        return all_AD, ctx.first

    @staticmethod
    def backward(ctx: Any, grad_AD: Tensor, _: Any) -> Tensor:
        total_AD = grad_AD.contiguous()
        dist.all_reduce(total_AD)
        return total_AD[ctx.first : ctx.first + ctx.count]


def gather_with_gradient(x_ND: Tensor) -> tuple[Tensor, int]:
    """(vectors of all ranks [A, D], where this rank's begin); collective when ranks > 1."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x_ND, 0
    return _Gather.apply(x_ND)
