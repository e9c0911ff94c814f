"""Block and Stack: layers with their norms and residual sums, and n of them.

    pre-norm   x = x + Attention(Norm(x));  x = x + FeedForward(Norm(x))     (GPT-2, Llama)
    post-norm  x = Norm(x + Attention(x));  x = Norm(x + FeedForward(x))     (Vaswani et al., BERT)

In a batch's journey: Trunk.forward (model/trunk.py) -> Stack.forward -> Block.forward -> layers.py.

Shapes: B batch, T tokens, S source tokens, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from nanolm.config.model import ModelConfig
from nanolm.model.cache import KeyValueCache
from nanolm.model.layers import FeedForward, GatedFeedForward, MultiHeadAttention, Norm
from nanolm.model.positions import Positions
from nanolm.ops.bias import Bias
from nanolm.ops.contract import Kernels
from nanolm.ops.masks import Mask
from nanolm.ops.matching import with_ranges

DEAR = frozenset(
    {
        "aten.mm.default",
        "aten.addmm.default",
        "aten.bmm.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_fused_attention_overrideable.default",
        "nanolm.attention.default",
    }
)
"""Operators whose results selective activation checkpointing keeps: matrix products and attention,
which are dear to compute again. What is large but cheap is computed again: norms, rotations and
activations read and write memory and multiply little, those of kernels/ too. The principle is that
of Korthikanti et al. 2022, section 5, but not the choice: they recompute attention, whose stored
scores and weights were large; attention here is one operator that stores neither, so its result is
kept. Names, since a model is built before the kernels are imported, and no version of torch knows
all of them. FlexAttention is computed again: what it has compiled is no operator."""


def kept_or_not(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether an operator's result is kept for the backward pass."""
    if is_dear(operator):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def is_dear(operator: Any) -> bool:
    """Whether the operator is one of DEAR."""
    return str(operator) in DEAR


CHECKPOINTS = {
    "full": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, kept_or_not),
    ),
}
"""How a block is computed that keeps less than autograd would (Chen et al. 2016), by the name in
train.activation_checkpointing."""


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

    attention_kind: ClassVar[type[MultiHeadAttention]] = MultiHeadAttention

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        spec: StackSpec,
        kernels: Kernels,
        bias_kind: str | None,
    ) -> None:
        super().__init__()
        self.attention = self.attention_kind(
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
        self.sublayer: Callable[[Tensor, Any, Any], Tensor]
        self.sublayer = self.pre_norm if model.norm_position == "pre" else self.post_norm
        self.recompute = "none"  # see Stack

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.recompute == "none" or not self.training:
            return self.compute(x_BTD, context)
        # Inside the block, so that a compiler sees what is to be kept: an operator that it has
        # made its own is no longer known by name.
        return CHECKPOINTS[self.recompute](self.compute, x_BTD, context)

    def compute(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D], keeping what autograd wants."""

        def attend(x: Tensor) -> Tensor:
            return self.attend(x, context)

        def attend_to_source(x: Tensor) -> Tensor:
            c = context
            return self.cross_attention(
                x, c.source_mask, c.positions, None, None, c.cache, source_BSD=c.source_BSD
            )

        # Attention moves information between tokens, the feed-forward works on each by itself: one
        # after the other, each adding to the stream what it has found.
        x_BTD = self.sublayer(x_BTD, self.attention_norm, attend)
        if context.source_BSD is not None:
            x_BTD = self.sublayer(x_BTD, self.cross_attention_norm, attend_to_source)
        return self.sublayer(x_BTD, self.feed_forward_norm, self.feed_forward)

    def attend(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]: what tokens read of each other."""
        c = context
        return self.attention(x_BTD, c.mask, c.positions, c.prepared, c.bias, c.cache)

    def pre_norm(self, x_BTD: Tensor, norm: nn.Module, layer: Any) -> Tensor:
        """x + layer(norm(x)) (Xiong et al. 2020)."""
        # x itself is never normed: from the last block to the first the gradient has a way through
        # sums alone, so deep stacks train without a long warm-up.
        return x_BTD + self.dropout(layer(norm(x_BTD)))

    def post_norm(self, x_BTD: Tensor, norm: Norm, layer: Any) -> Tensor:
        """norm(x + layer(x)) (Vaswani et al. 2017, section 3.1)."""
        # The stream itself is normed, so it keeps its size with depth and no final norm is needed;
        # the price is a gradient that passes every norm, and a warm-up.
        return norm.after_sum(self.dropout(layer(x_BTD)), x_BTD)[0]


class Stack(nn.Module):
    """n_layers blocks, or one that runs n_layers times (Lan et al. 2020, section 3.1), with the
    final norm that pre-norm needs."""

    block_kind: ClassVar[type[Block]] = Block

    def __init__(
        self, model: ModelConfig, spec: StackSpec, kernels: Kernels, bias_kind: str | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            self.block_kind(model, layer, spec, kernels, bias_kind)
            for layer in range(1 if model.share_layers else model.n_layers)
        )
        self.n_layers = model.n_layers
        chosen = kernels.chosen("attention")
        self.finds_ranges = any(getattr(kernel, "reads_ranges", False) for kernel in chosen)
        # A pre-norm stream grows with every block; the head reads it at the size that the blocks'
        # layers read it.
        self.final_norm = Norm(model, kernels) if model.norm_position == "pre" else nn.Identity()
        rate = model.final_dropout
        self.final_dropout = nn.Dropout(rate) if rate else nn.Identity()
        self.recompute = "none"

    @property
    def recompute(self) -> str:
        """Activation checkpointing: none, full or selective."""
        return cast(Block, self.blocks[0]).recompute

    @recompute.setter
    def recompute(self, how: str) -> None:
        for block in cast(Iterable[Block], self.blocks):
            block.recompute = how
            # Nothing inside is kept anyhow, and what `keeping_input` holds would be.
            block.feed_forward.keeps_input = how == "none"

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        context = self.of_stack(context)
        for layer in range(self.n_layers):
            block = self.blocks[layer % len(self.blocks)]
            x_BTD = block(x_BTD, self.of_layer(context, layer))
        return self.final_dropout(self.final_norm(x_BTD))

    def of_stack(self, context: Context) -> Context:
        """The context with what its mask leaves to be looked at, where kernels ask for that."""
        if not self.finds_ranges:
            return context
        # Once for all layers, and for their backward passes: where documents lie differs from
        # batch to batch and not from layer to layer.
        return dataclasses.replace(context, mask=with_ranges(context.mask))

    def of_layer(self, context: Context, layer: int) -> Context:
        """What block `layer` needs of the context."""
        # Angles are computed once for the stack; layers differ at most in which of them they
        # take (a local layer's base is another than a global one's).
        prepared = context.positions.of_layer(context.prepared, layer)
        return dataclasses.replace(context, prepared=prepared)
