"""The trunks: Decoder and Encoder, from the same blocks. They return hidden states only.

    tokens -> embedding (+ segments, + positions) -> Stack -> hidden states [B, T, D]

The vocabulary projection, and every other way to read the hidden states, is a head (`heads.py`).

Shapes: B batch, T tokens, S source tokens, D model width.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.model.blocks import Context, Stack, StackSpec
from nanolm.model.cache import KeyValueCache
from nanolm.model.layers import Norm
from nanolm.ops.contract import Kernels
from nanolm.ops.masks import Mask
from nanolm.registry import POSITIONS, TRUNKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a trunk reads. Either tokens or embeddings; all integer tensors are int64."""

    tokens_BT: Tensor | None = None
    embeddings_BTD: Tensor | None = None
    positions_BT: Tensor | None = None  # None: 0..T-1, continued from the cache
    segments_BT: Tensor | None = None
    mask: Mask = dataclasses.field(default_factory=Mask)
    source_BSD: Tensor | None = None
    source_mask: Mask = dataclasses.field(default_factory=Mask)
    cache: KeyValueCache | None = None


class Trunk(nn.Module):
    """Embeddings and a stack of blocks; `spec` is all that tells an encoder from a decoder."""

    def __init__(self, model: ModelConfig, spec: StackSpec, kernels: Kernels) -> None:
        super().__init__()
        if model.vocab_size is None:
            raise ValueError("model.vocab_size must be known when the model is built")
        self.kernels = kernels  # for whoever chooses more of them later: Muon
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        self.segments = nn.Embedding(model.n_segments, model.d_model) if model.n_segments else None
        entry = POSITIONS.get(model.positions.name)
        self.positions = entry.build(model.positions, model, kernels)
        self.embedding_norm = Norm(model, kernels) if model.embedding_norm else nn.Identity()
        self.scale = math.sqrt(model.d_model) if model.embedding_scale else 1.0
        self.dropout = nn.Dropout(model.dropout) if model.dropout else nn.Identity()
        self.stack = Stack(model, spec, kernels, self.positions.bias_kind)
        self.max_length = model.max_length

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, first to last."""
        return self.stack.blocks

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(x [B, T, D] before the first block, positions [B, T])."""
        x_BTD = inputs.embeddings_BTD
        if x_BTD is None:
            x_BTD = self.embedding(inputs.tokens_BT) * self.scale
        positions_BT = inputs.positions_BT
        if positions_BT is None:
            start = 0 if inputs.cache is None else inputs.cache.length
            stop = start + x_BTD.shape[1]
            positions_BT = torch.arange(start, stop, device=x_BTD.device)[None]
        if self.segments is not None:
            segments_BT = inputs.segments_BT  # one-segment inputs are all segment 0, as in BERT
            segments_BT = torch.zeros_like(positions_BT) if segments_BT is None else segments_BT
            x_BTD = x_BTD + self.segments(segments_BT)
        x_BTD = self.positions.embed(x_BTD, positions_BT)
        return self.dropout(self.embedding_norm(x_BTD)), positions_BT

    def forward(self, inputs: Inputs) -> Tensor:
        """Hidden states [B, T, D], after the final norm."""
        x_BTD, positions_BT = self.embed(inputs)
        context = Context(
            mask=inputs.mask,
            positions=self.positions,
            prepared=self.positions.prepare(positions_BT),
            bias=self.positions.bias(),
            cache=inputs.cache,
            source_BSD=inputs.source_BSD,
            source_mask=inputs.source_mask,
        )
        return self.stack(x_BTD, context)


@TRUNKS.register("decoder")
def decoder(model: ModelConfig, kernels: Kernels, masks: frozenset[str] = frozenset()) -> Trunk:
    """A causal trunk: token t sees tokens up to t (Radford et al. 2019)."""
    return Trunk(model, StackSpec(causal=True, masks=masks), kernels)


@TRUNKS.register("encoder")
def encoder(model: ModelConfig, kernels: Kernels, masks: frozenset[str] = frozenset()) -> Trunk:
    """A bidirectional trunk: every token sees every token (Devlin et al. 2019)."""
    return Trunk(model, StackSpec(causal=False, masks=masks), kernels)
