"""The trunk of XLNet: two streams through the same blocks (Yang et al. 2019, sections 2.3 and 2.5).

    content  h   the tokens, each of which sees itself and what comes before it in the order
    query    g   one learned vector at every place that is predicted, which sees less: not itself

Keys and values always come from the content stream, behind those of the memory: the hidden states
of the tokens before the row, which get no gradient. So both streams are rows of one batch, content
first: a block reads [h; g] and takes its keys from h, and norms and feed-forwards need not know.
Which queries see which keys is the Mask that a batch brings, T + P queries and M + T keys.

Without places there is one stream, and the trunk is an encoder with relative positions.

A row may be several segments of a text (in the sense of recurrence: Dai et al. 2019, section 3.2),
which are read one after another: each reuses the hidden states of the one before, and behind those
of the one before that, as its memory. A row's first segment has the memory of the M tokens before
it, made anew by the present weights; they see each other, and nothing before them. XLNet keeps what
the step before has computed instead, which is older than the weights, and for which rows must come
in the order of the text.

Shapes: B batch, T tokens, P places that are predicted, M tokens of memory, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.errors import require
from nanolm.model.blocks import Block, Context, Stack, StackSpec
from nanolm.model.relative import Relations, Relative, RelativeAttention, Tokens
from nanolm.model.trunk import Inputs, Trunk
from nanolm.ops.contract import Kernels
from nanolm.ops.masks import Mask
from nanolm.registry import TRUNKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStreamContext(Context):
    """Besides: how many rows of x are content, and the memory, of all blocks or of one."""

    n_content: int
    memory: tuple[Tensor, ...] | None = None
    memory_BMD: Tensor | None = None


class TwoStreamBlock(Block):
    """A block whose keys come from memory and content."""

    attention_kind = RelativeAttention

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        spec: StackSpec,
        kernels: Kernels,
        bias_kind: str | None,
    ) -> None:
        super().__init__(model, layer, spec, kernels, bias_kind)
        self.normed = self.attention_norm_of if model.norm_position == "pre" else keep

    def attend(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T + P, D] -> [B, T + P, D]; x is what attention reads, after the norm if that comes
        first, and so must the memory be."""
        c = cast(TwoStreamContext, context)
        return self.attention(
            x_BTD, c.mask, c.positions, c.prepared, None, None, source_BSD=self.keys(x_BTD, c)
        )

    def keys(self, x_BTD: Tensor, context: TwoStreamContext) -> Tensor | None:
        """What keys and values are made of, where it is not x itself."""
        content_BTD = x_BTD[:, : context.n_content]
        if context.memory_BMD is not None:
            memory_BMD = self.normed(context.memory_BMD).to(x_BTD.dtype)
            return torch.cat([memory_BMD, content_BTD], dim=1)
        return None if context.n_content == x_BTD.shape[1] else content_BTD

    def attention_norm_of(self, x: Tensor) -> Tensor:
        """What this block's attention reads of hidden states before its norm."""
        return self.attention_norm(x)


def keep(x: Tensor) -> Tensor:
    """Hidden states that were normed when they were written."""
    return x


class TwoStreamStack(Stack):
    """Blocks, each with the memory of its own depth."""

    block_kind = TwoStreamBlock

    def of_layer(self, context: Context, layer: int) -> TwoStreamContext:
        """Relations are the same for all blocks, memory is not."""
        mine = cast(TwoStreamContext, super().of_layer(context, layer))
        memory_BMD = None if mine.memory is None else mine.memory[layer]
        return dataclasses.replace(mine, memory_BMD=memory_BMD)

    def read_by_blocks(self, x_BTD: Tensor, context: TwoStreamContext) -> tuple[Tensor, ...]:
        """The hidden states [B, T, D] before each block: what a later row has for a memory."""
        found = []
        for layer, block in enumerate(self.blocks):
            found.append(x_BTD)
            if layer + 1 < len(self.blocks):  # nobody asks what the last one makes of them
                x_BTD = block(x_BTD, self.of_layer(context, layer))
        return tuple(found)

    def forward_and_keep(
        self, x_BTD: Tensor, context: TwoStreamContext, n_kept: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(what `forward` returns, the hidden states [B, n_kept, D] of the first tokens before each
        block, which get no gradient)."""
        of_stack, kept = self.of_stack(context), []
        for layer, block in enumerate(self.blocks):
            kept.append(x_BTD[:, :n_kept].detach())
            x_BTD = block(x_BTD, self.of_layer(of_stack, layer))
        return self.final_dropout(self.final_norm(x_BTD)), tuple(kept)


class TwoStream(Trunk):
    """Embeddings, one vector for all that is predicted, and blocks that both streams go through."""

    stack_kind = TwoStreamStack

    def __init__(self, model: ModelConfig, spec: StackSpec, kernels: Kernels) -> None:
        require(
            model.positions.name == "relative",
            f"model.trunk=two_stream reads distances in every block: set model.positions to "
            f"relative, not {model.positions.name}",
        )
        require(
            set(model.window) == {None},
            f"model.window={model.window} cannot go with model.trunk=two_stream, whose keys are "
            f"memory too; set it to [null]",
        )
        super().__init__(model, spec, kernels)
        self.query = nn.Embedding(1, model.d_model)
        # A batch has places only where it has an order; a task's has neither, and DDP must find no
        # weight that waits for a gradient in vain.
        self.query.weight.requires_grad_("order" in spec.masks)

    def add_segments(self, model: ModelConfig) -> None:
        """None are embedded: blocks tell the same segment from another one (relative.py)."""
        self.segments = None

    def forward(self, inputs: Inputs) -> Tensor:
        """Hidden states [B, T + P, D]: the content's, then those of the places; and behind them,
        likewise, those of each segment that follows in the row."""
        memory = inputs.memory
        if inputs.memory_tokens_BM is not None:
            memory = self.remember(inputs.memory_tokens_BM)
        *earlier, last = inputs, *inputs.following
        stack, found = cast(TwoStreamStack, self.stack), []
        for segment in earlier:
            x_BTD, kept = stack.forward_and_keep(*self.prepare(segment, memory), segment.n_reused)
            found.append(x_BTD)
            memory = kept if memory is None else tuple(map(newest, memory, kept))
        found.append(stack(*self.prepare(last, memory)))
        return torch.cat(found, dim=1)

    def prepare(
        self, inputs: Inputs, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, TwoStreamContext]:
        """(x [B, T + P, D] before the first block, the context) of one segment."""
        x_BTD, positions_BT = self.embed(inputs)
        content = Tokens(positions=positions_BT, segments=segments_of(inputs, positions_BT))
        queries = content
        if inputs.places_BP is not None:
            query_BPD = self.query.weight.expand(*inputs.places_BP.shape, -1)
            x_BTD = torch.cat([x_BTD, self.dropout(query_BPD).to(x_BTD.dtype)], dim=1)
            queries = with_places(content, inputs.places_BP)
        context = TwoStreamContext(
            mask=inputs.mask,
            positions=self.positions,
            prepared=self.relations(queries, content, 0 if memory is None else memory[0].shape[1]),
            bias=None,
            n_content=content.positions.shape[1],
            memory=memory,
        )
        return x_BTD, context

    @torch.no_grad()
    def remember(self, tokens_BM: Tensor) -> tuple[Tensor, ...]:
        """The hidden states [B, M, D] that each block reads of the tokens before a row."""
        x_BMD, positions_BM = self.embed(Inputs(tokens_BT=tokens_BM))
        content = Tokens(positions=positions_BM, segments=torch.zeros_like(positions_BM))
        context = TwoStreamContext(
            mask=Mask(),
            positions=self.positions,
            prepared=self.relations(content, content, 0),
            bias=None,
            n_content=tokens_BM.shape[1],
        )
        return cast(TwoStreamStack, self.stack).read_by_blocks(x_BMD, context)

    def relations(self, queries: Tokens, content: Tokens, n_memory: int) -> Relations:
        """Of every query to memory and content; the memory lies before, in the first segment."""
        positions: Relative = self.positions
        first = torch.arange(-n_memory, 0, device=content.positions.device)[None]
        keys = Tokens(
            positions=beside(first, content.positions),
            segments=beside(torch.zeros_like(first), content.segments),
        )
        n_content = content.positions.shape[1]
        return positions.between(
            queries, keys, behind=n_memory + n_content - 1, ahead=n_content - 1
        )


def newest(memory_BMD: Tensor, states_BTD: Tensor) -> Tensor:
    """The last M of memory and what came after it, [B, M, D]: a short segment leaves a part of the
    older memory in place, as in XLNet's code."""
    n_memory = memory_BMD.shape[1]
    n_older = max(n_memory - states_BTD.shape[1], 0)
    return torch.cat([memory_BMD[:, n_memory - n_older :], states_BTD[:, -n_memory:]], dim=1)


def segments_of(inputs: Inputs, positions_BT: Tensor) -> Tensor:
    """The segments of the tokens; all are in the first where a batch tells none."""
    return torch.zeros_like(positions_BT) if inputs.segments_BT is None else inputs.segments_BT


def with_places(content: Tokens, places_BP: Tensor) -> Tokens:
    """Content, and behind it the queries, which stand where the tokens do that they predict."""

    def longer(values: Tensor) -> Tensor:
        values = values.expand(places_BP.shape[0], -1)
        return torch.cat([values, values.gather(1, places_BP)], dim=1)

    return Tokens(positions=longer(content.positions), segments=longer(content.segments))


def beside(first: Tensor, second: Tensor) -> Tensor:
    """[1, M] and [B, T] -> [B, M + T]."""
    # The shape and not len(), which is a plain number while a graph is traced.
    return torch.cat([first.expand(second.shape[0], -1), second], dim=1)


@TRUNKS.register("two_stream")
def two_stream(
    model: ModelConfig, kernels: Kernels, masks: frozenset[str] = frozenset()
) -> TwoStream:
    """A bidirectional trunk that can predict tokens in any order (Yang et al. 2019)."""
    return TwoStream(model, StackSpec(causal=False, masks=masks), kernels)
