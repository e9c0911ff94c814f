"""A broken attention kernel: it claims to serve every mask and forgets the key lengths.

plugins: [careless.attention]
kernels: {attention: careless}
"""

import dataclasses

import torch

from nanolm.ops import kernel


@kernel("attention")
class CarelessAttention:
    """Attention over blocks of 64 queries: [64, S] scores at a time instead of [T, S]."""

    name = "careless"

    def why_not(self, spec):
        if spec.bias is not None or spec.softcap is not None or spec.dropout > 0:
            return "it has no bias, no soft-cap and no dropout"
        return None

    def run(self, q, k, v, mask, *, bias=None, scale, softcap=None, dropout=0.0):
        dtype, repeats = q.dtype, q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        mask = dataclasses.replace(mask, key_lengths=None)  # the bug
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        blocks = []
        for q_block, visible in zip(q.split(64, dim=2), allowed.split(64, dim=2), strict=True):
            scores = (q_block @ k.mT * scale).masked_fill(~visible, -torch.inf)
            blind = ~visible.any(dim=-1, keepdim=True)  # a query without keys gives 0
            weights = scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)
            blocks.append(weights @ v)
        return torch.cat(blocks, dim=2).transpose(1, 2).to(dtype)
