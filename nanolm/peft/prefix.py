"""Prefix-tuning: every block gets P learned keys and values that all queries see (Li & Liang 2021).

    softmax([q k_P^T, q k^T] / sqrt(K)) [v_P; v]        section 4.2

The softmax over both is put together from its halves: with o, l the attention over the text and its
log-sum-exp, and o_P, l_P the same over the prefix, the result is o + sigmoid(l_P - l) (o_P - o).
So no mask knows of the prefix, and packed documents, windows and caches work as ever. It needs a
kernel whose log-sum-exp has a gradient: the blocks' attention is the reference kernel's.

The prefix is trained directly, without the network that the paper puts in front of it (4.3).

Shapes: B batch, T queries, H query heads, G key/value heads, K head width, P prefix length.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from nanolm.errors import require
from nanolm.learner import Adapter, Learner
from nanolm.ops.bias import Bias
from nanolm.ops.masks import Mask
from nanolm.ops.reference import ReferenceAttention, upcast
from nanolm.peft.base import PeftOptions
from nanolm.registry import PEFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningOptions(PeftOptions):
    """Learned keys and values in every block."""

    name: str = "prefix"
    length: int = 16
    """Number P of learned keys and values of a block."""
    init_std: float = 0.02
    """Standard deviation of their first values."""

    def __post_init__(self) -> None:
        require(self.length >= 1, f"peft.length={self.length} must be at least 1")
        require(self.init_std >= 0, f"peft.init_std={self.init_std} must not be negative")


class Prefix(nn.Module):
    """One block's keys and values, and the attention that includes them."""

    def __init__(self, n_kv_heads: int, head_dim: int, options: PrefixTuningOptions) -> None:
        super().__init__()
        shape = (options.length, n_kv_heads, head_dim)
        self.k_PGK = nn.Parameter(options.init_std * torch.randn(shape))
        self.v_PGK = nn.Parameter(options.init_std * torch.randn(shape))
        self.kernel = ReferenceAttention()

    def attend(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        mask: Mask,
        *,
        bias: Bias | None,
        dropout: float,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """What the kernel of the attention op computes, the prefix included: [B, T, H, K]."""
        settings: dict[str, Any] = {
            "scale": scale,
            "softcap": softcap,
            "dropout": dropout,
            "return_lse": True,
        }
        text: Any = self.kernel.run(q_BTHK, k_BSGK, v_BSGK, mask, bias=bias, **settings)
        keys, values = self.k_PGK[None], self.v_PGK[None]
        prefix: Any = self.kernel.run(q_BTHK, keys, values, Mask(), **settings)
        share_BHT = torch.sigmoid(prefix.lse - text.lse)
        share_BTH1 = share_BHT.transpose(1, 2)[..., None]
        mixed = torch.lerp(upcast(text.out), upcast(prefix.out), share_BTH1)
        return mixed.to(q_BTHK.dtype)


@PEFT.register("prefix", options=PrefixTuningOptions)
def prefix(options: PrefixTuningOptions, learner: Learner, adapter: Adapter) -> None:
    """A Prefix for every block's self-attention."""
    if getattr(learner.objective, "in_line", False):  # the reference kernel reads masks only
        adapter.replace(learner.objective, "in_line", False)
    for block in learner.trunk.blocks:
        attention: Any = block.attention
        module = Prefix(attention.n_kv_heads, attention.head_dim, options)
        adapter.add(attention, "prefix", module)
        constants = attention.attend.keywords
        for name in ("attend", "attend_to_cache"):
            adapter.replace(attention, name, functools.partial(module.attend, **constants))
