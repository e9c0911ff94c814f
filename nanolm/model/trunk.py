"""The trunks: decoder, encoder and encoder-decoder, from the same blocks. They return hidden states
only.

    tokens -> embedding (+ segments, + positions) -> Stack -> hidden states [B, T, D]

    source -> the same embedding -> Stack -----------+                  (encoder-decoder)
    tokens -> embedding -> Stack that also reads the source's hidden states -> [B, T, D]

The vocabulary projection, and every other way to read the hidden states, is a head (`heads.py`).

Shapes: B batch, T tokens, S source tokens, D model width (E of embeddings that have their own).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.model.blocks import Context, Stack, StackSpec
from nanolm.model.cache import KeyValueCache
from nanolm.model.layers import Linear, Norm
from nanolm.model.positions import Positions
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
    source_tokens_BS: Tensor | None = None  # an encoder-decoder's source, or its hidden states:
    source_BSD: Tensor | None = None
    source_mask: Mask = dataclasses.field(default_factory=Mask)
    places_BP: Tensor | None = None  # which tokens a second stream predicts (two_stream.py)
    memory_tokens_BM: Tensor | None = None  # what stands before the row, or its hidden states,
    memory: tuple[Tensor, ...] | None = None  # [B, M, D] as each block reads them
    n_reused: int = 0  # first tokens, whose hidden states are a memory for the segment after this
    following: tuple[Inputs, ...] = ()  # the row's other segments, in order
    cache: KeyValueCache | None = None


class Trunk(nn.Module):
    """Embeddings and a stack of blocks; `spec` is all that tells an encoder from a decoder."""

    stack_kind: ClassVar[type[Stack]] = Stack

    def __init__(self, model: ModelConfig, spec: StackSpec, kernels: Kernels) -> None:
        super().__init__()
        if model.vocab_size is None:
            raise ValueError("model.vocab_size must be known when the model is built")
        self.causal = spec.causal
        self.kernels = kernels  # for whoever chooses more of them later: Muon
        width = model.embedded_width
        self.embedding = nn.Embedding(model.vocab_size, width)
        self.add_segments(model)
        entry = POSITIONS.get(model.positions.name)
        self.positions = entry.build(model.positions, as_embedded(model), kernels)
        self.embedding_norm = Norm(model, kernels, width) if model.embedding_norm else nn.Identity()
        self.scale = math.sqrt(model.d_model) if model.embedding_scale else 1.0
        self.dropout = nn.Dropout(model.dropout) if model.dropout else nn.Identity()
        self.projection = widening(model, kernels)
        self.stack = self.stack_kind(model, spec, kernels, self.positions.bias_kind)
        self.max_length = model.max_length

    def add_segments(self, model: ModelConfig) -> None:
        """A vector for each segment, if there are any."""
        self.segments: nn.Embedding | None = None
        if model.n_segments:
            self.segments = nn.Embedding(model.n_segments, model.embedded_width)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, first to last."""
        return self.stack.blocks

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks, in the order in which a batch goes through them."""
        return (self.stack,)

    @property
    def position_encodings(self) -> tuple[Positions, ...]:
        """The position encoding of each stack."""
        return (self.positions,)

    def embed(self, inputs: Inputs, positions: Positions | None = None) -> tuple[Tensor, Tensor]:
        """(x [B, T, D] before the first block, positions [B, T]); with another position encoding
        than the trunk's own if one is given."""
        positions = positions or self.positions
        x_BTD = inputs.embeddings_BTD
        if x_BTD is None:
            # sqrt(D), where the model asks for it: an embedding tied to the vocabulary head starts
            # with entries of init_std, too small beside sinusoidal positions of size 1 (Vaswani et
            # al. 2017, section 3.4).
            x_BTD = self.embedding(inputs.tokens_BT) * self.scale
        positions_BT = inputs.positions_BT
        if positions_BT is None:
            # New tokens stand behind those that the cache holds.
            start = 0 if inputs.cache is None else inputs.cache.length
            stop = start + x_BTD.shape[1]
            positions_BT = torch.arange(start, stop, device=x_BTD.device)[None]
        if self.segments is not None:
            segments_BT = inputs.segments_BT  # one-segment inputs are all segment 0, as in BERT
            segments_BT = torch.zeros_like(positions_BT) if segments_BT is None else segments_BT
            x_BTD = x_BTD + self.segments(segments_BT)
        # Absolute positions are added once, at the bottom; rotary and bias encodings leave x alone
        # and act inside each attention instead.
        x_BTD = positions.embed(x_BTD, positions_BT)
        return self.projection(self.dropout(self.embedding_norm(x_BTD))), positions_BT

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


def as_embedded(model: ModelConfig) -> ModelConfig:
    """The model as its embeddings see it: as wide as they are."""
    if model.embedding_width is None:
        return model
    return dataclasses.replace(
        model, d_model=model.embedding_width, head_dim=model.head_width, embedding_width=None
    )


def widening(model: ModelConfig, kernels: Kernels) -> nn.Module:
    """From the embeddings' own width to the blocks': a vocabulary of 30,000 words then costs V E +
    E D weights instead of V D (Lan et al. 2020, section 3.1)."""
    if model.embedding_width is None:
        return nn.Identity()
    return Linear(model.embedding_width, model.d_model, kernels, bias=True)


class EncoderDecoder(Trunk):
    """A decoder whose blocks read what an encoder made of the source (Vaswani et al. 2017).

    Both embed with one table. Each stack has a position encoding of its own: T5's is two-sided in
    the encoder and one-sided in the decoder, and cross-attention has none (Raffel et al. 2020,
    section 2.1). The masks that batches may bring are the source's; targets stand left-aligned, so
    causality keeps what fills them up from being seen.
    """

    def __init__(self, model: ModelConfig, masks: frozenset[str], kernels: Kernels) -> None:
        super().__init__(model, StackSpec(causal=True, masks=frozenset(), cross=True), kernels)
        entry = POSITIONS.get(model.positions.name)
        as_encoder = dataclasses.replace(model, trunk="encoder")
        self.encoder_positions = entry.build(model.positions, as_encoder, kernels)
        spec = StackSpec(causal=False, masks=masks)
        self.encoder_stack = Stack(model, spec, kernels, self.encoder_positions.bias_kind)

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's blocks, then the decoder's."""
        return nn.ModuleList([*self.encoder_stack.blocks, *self.stack.blocks])

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The encoder's, then the decoder's."""
        return (self.encoder_stack, self.stack)

    @property
    def position_encodings(self) -> tuple[Positions, ...]:
        """The encoder's, then the decoder's."""
        return (self.encoder_positions, self.positions)

    def encode(self, inputs: Inputs) -> Tensor:
        """Hidden states [B, S, D] of the source's tokens."""
        source = Inputs(tokens_BT=inputs.source_tokens_BS, mask=inputs.source_mask)
        x_BSD, positions_BS = self.embed(source, self.encoder_positions)
        context = Context(
            mask=source.mask,
            positions=self.encoder_positions,
            prepared=self.encoder_positions.prepare(positions_BS),
            bias=self.encoder_positions.bias(),
        )
        return self.encoder_stack(x_BSD, context)

    def forward(self, inputs: Inputs) -> Tensor:
        """Hidden states [B, T, D] of the decoder; a source that is encoded already stays so."""
        if inputs.source_BSD is None:
            inputs = dataclasses.replace(inputs, source_BSD=self.encode(inputs))
        return super().forward(inputs)


def encoder_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a learner, by name, as a base for an encoder trunk: of an encoder-decoder only
    the encoder, under the names that it has when it is alone, and no head, since heads read the
    decoder. Those of any other learner are what they are."""
    if not any(name.startswith("trunk.encoder_stack.") for name in tensors):
        return dict(tensors)
    named = {"trunk.encoder_stack.": "trunk.stack.", "trunk.encoder_positions.": "trunk.positions."}
    left_out = ("heads.", *named.values())
    found = {name: t for name, t in tensors.items() if not name.startswith((*left_out, *named))}
    for theirs, ours in named.items():
        for name, tensor in tensors.items():
            if name.startswith(theirs):
                found[ours + name.removeprefix(theirs)] = tensor
    return found


@TRUNKS.register("decoder")
def decoder(model: ModelConfig, kernels: Kernels, masks: frozenset[str] = frozenset()) -> Trunk:
    """A causal trunk: token t sees tokens up to t (Radford et al. 2019)."""
    return Trunk(model, StackSpec(causal=True, masks=masks), kernels)


@TRUNKS.register("encoder")
def encoder(model: ModelConfig, kernels: Kernels, masks: frozenset[str] = frozenset()) -> Trunk:
    """A bidirectional trunk: every token sees every token (Devlin et al. 2019)."""
    return Trunk(model, StackSpec(causal=False, masks=masks), kernels)


@TRUNKS.register("encoder_decoder")
def encoder_decoder(
    model: ModelConfig, kernels: Kernels, masks: frozenset[str] = frozenset()
) -> EncoderDecoder:
    """A decoder that reads an encoder's source (Vaswani et al. 2017; Raffel et al. 2020)."""
    return EncoderDecoder(model, masks, kernels)
