"""Block and Stack: layers with their norms and residual sums, and n of them.

    pre-norm   x = x + Attention(Norm(x));  x = x + FeedForward(Norm(x))     (GPT-2, Llama)
    post-norm  x = Norm(x + Attention(x));  x = Norm(x + FeedForward(x))     (Vaswani et al., BERT)

In a batch's journey: Trunk.forward (model.py) -> Stack.forward -> Block.forward -> layers.py.

Shapes: B batch, T tokens, S source tokens, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from nanolm.bias import Bias
from nanolm.cache import KeyValueCache
from nanolm.layers import FeedForward, GatedFeedForward, MultiHeadAttention, Norm
from nanolm.masks import Mask
from nanolm.model_config import ModelConfig
from nanolm.ops import Kernels
from nanolm.positions import Positions

_ATEN = torch.ops.aten
KEEP_PRODUCTS = functools.partial(
    create_selective_checkpoint_contexts,
    [
        *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default),
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ],
)
"""Selective activation checkpointing keeps what is dear to compute again: matrix products and
attention. What is large but cheap is computed again (Korthikanti et al. 2022, section 5)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackSpec:
    """What tells one stack from another: causal or not, which masks batches may bring, and whether
    its blocks read a source (the decoder of an encoder-decoder)."""

    causal: bool
    masks: frozenset[str]
    cross: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What every block of a stack needs besides x, computed once per forward pass."""

    mask: Mask
    positions: Positions
    prepared: Any
    bias: Bias | None
    cache: KeyValueCache | None = None
    source_BSD: Tensor | None = None
    source_mask: Mask | None = None


class Block(nn.Module):
    """Attention, cross-attention if the stack has a source, and feed-forward, each with its norm
    and residual sum."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        spec: StackSpec,
        kernels: Kernels,
        bias_kind: str | None,
    ) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            model, layer, kernels, causal=spec.causal, bias_kind=bias_kind, masks=spec.masks
        )
        # After an embedding norm the first pre-norm would norm twice; ModernBERT drops it too.
        normed = model.norm_position == "pre" and model.embedding_norm and layer == 0
        self.attention_norm = nn.Identity() if normed else Norm(model, kernels)
        if spec.cross:
            self.cross_attention = MultiHeadAttention(
                model,
                layer,
                kernels,
                causal=False,
                bias_kind=None,
                masks=frozenset({"lengths"}),
                cross=True,
            )
            self.cross_attention_norm = Norm(model, kernels)
        feed_forward = GatedFeedForward if model.gated else FeedForward
        self.feed_forward = feed_forward(model, kernels)
        self.feed_forward_norm = Norm(model, kernels)
        self.dropout = nn.Dropout(model.dropout) if model.dropout else nn.Identity()
        self.sublayer = self.pre_norm if model.norm_position == "pre" else self.post_norm

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""

        def attend(x: Tensor) -> Tensor:
            c = context
            return self.attention(x, c.mask, c.positions, c.prepared, c.bias, c.cache)

        def attend_to_source(x: Tensor) -> Tensor:
            c = context
            return self.cross_attention(
                x, c.source_mask, c.positions, None, None, source_BSD=c.source_BSD
            )

        x_BTD = self.sublayer(x_BTD, self.attention_norm, attend)
        if context.source_BSD is not None:
            x_BTD = self.sublayer(x_BTD, self.cross_attention_norm, attend_to_source)
        return self.sublayer(x_BTD, self.feed_forward_norm, self.feed_forward)

    def pre_norm(self, x_BTD: Tensor, norm: nn.Module, layer: Any) -> Tensor:
        """x + layer(norm(x)) (Xiong et al. 2020)."""
        return x_BTD + self.dropout(layer(norm(x_BTD)))

    def post_norm(self, x_BTD: Tensor, norm: Norm, layer: Any) -> Tensor:
        """norm(x + layer(x)) (Vaswani et al. 2017, section 3.1)."""
        return norm.after_sum(self.dropout(layer(x_BTD)), x_BTD)[0]


class Stack(nn.Module):
    """n_layers blocks, with the final norm that pre-norm needs."""

    def __init__(
        self, model: ModelConfig, spec: StackSpec, kernels: Kernels, bias_kind: str | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(model, layer, spec, kernels, bias_kind) for layer in range(model.n_layers)
        )
        self.final_norm = Norm(model, kernels) if model.norm_position == "pre" else nn.Identity()
        self.recompute = "none"  # activation checkpointing: full or selective (Chen et al. 2016)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        for block in self.blocks:
            if self.recompute != "none" and self.training:
                # Nothing inside is kept anyhow, and what `keeping_input` holds would be.
                block.feed_forward.keeps_input = False
                kept = noop_context_fn if self.recompute == "full" else KEEP_PRODUCTS
                x_BTD = checkpoint(block, x_BTD, context, use_reentrant=False, context_fn=kept)
            else:
                x_BTD = block(x_BTD, context)
        return self.final_norm(x_BTD)
